"""Small trainings of mmseg for tests: a folder of pictures, a configuration of a small UPerNet, what a run logged."""

import os
import pprint
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.mm_models import upernet
from vmamba.mm.curves import read_run
from vmamba.tools.cli import main

ROOT = Path(__file__).parents[1]
NAME = "vmamba_tiny_s1l8"
CONFIG = """\
custom_imports = dict(imports=["vmamba.mm", "tests.mm_faults"], allow_failed_imports=False)
default_scope = "mmseg"
model = {model}
data = dict(
    type="BaseSegDataset", data_root={root!r}, data_prefix=dict(img_path="images", seg_map_path="labels"),
    img_suffix=".png", seg_map_suffix=".png", metainfo=dict(classes=("a", "b", "c"), palette=[[0], [1], [2]]),
    pipeline=[
        dict(type="SeedBySample"), dict(type="LoadReadable"), dict(type="LoadAnnotations"),
        dict(type="RandomFlip", prob=0.5), dict(type="PackSegInputs"),
    ],
)
sampler = dict(type="NumberedSampler", shuffle=True)
train_dataloader = dict(batch_size=2, num_workers=0, dataset=data, sampler=sampler)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05))
optim_wrapper.update(constructor="VMambaOptimWrapperConstructor")
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=4)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=8)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type="WholeCheckpointHook", by_epoch=False, interval=3, max_keep_ckpts=1),
)
custom_hooks = [dict(type="SeedByIterationHook"), dict(type="MeanLossHook")]
log_processor = dict(by_epoch=False, window_size=1)
randomness = dict(seed=0)
"""


def write_config(folder: Path, *, images: int = 9, drop_path_rate: float = 0.0) -> Path:
    """``folder/upernet.py`` and ``images`` noisy pictures of 32 x 40 pixels with three classes."""
    draw = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(images):
        labels = draw.integers(3, size=(4, 5), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        pixels = labels[..., None] * 80 + draw.integers(40, size=(32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
        Image.fromarray(labels).save(folder / f"labels/{i}.png")
    model = upernet(NAME, drop_path_rate=drop_path_rate)
    for head in ("decode_head", "auxiliary_head"):
        model[head]["norm_cfg"] = dict(type="GN", num_groups=2)
    path = folder / "upernet.py"
    path.write_text(CONFIG.format(model=pprint.pformat(model), root=str(folder)))
    return path


def train(config: Path, folder: Path, *options: str, resume: bool = False) -> int:
    """``vmamba train`` in this process; its exit code. ``options`` are settings, KEY=VALUE."""
    words = ["--work-dir", str(folder), *(["--resume"] if resume else [])]
    name = f"experiment_name={folder.name}{len(list(folder.glob('*')))}"
    return main(["train", str(config), *words, "--cfg-options", name, *options])


def start(command: list[str], folder: Path, port: int = 29500, **variables: str) -> subprocess.CompletedProcess:
    """A command of the checkout in another process, without a GPU."""
    environment = {**os.environ, "PYTHON": sys.executable, "PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def losses(folder: Path) -> dict[int, float]:
    """Iteration -> loss of a run."""
    return {step: row["loss"] for step, row in read_run(folder).train.items()}

"""vmamba train, test and doctor with a small segmentor on made-up images, from the command line."""

import pickle
import pprint
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.mm_models import upernet
from vmamba.checkpoint import read
from vmamba.doctor import doctor
from vmamba.openmmlab import SUPPORTED, Toolbox, _clash, _out_of_range, advice_on, explain, toolboxes
from vmamba.tools.cli import main

ROOT = Path(__file__).parents[1]
NAME = "vmamba_tiny_s1l8"
TEMPLATE = """\
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
default_scope = "mmseg"
model = {model}
data = dict(
    type="BaseSegDataset", data_root={root!r}, data_prefix=dict(img_path="images", seg_map_path="labels"),
    img_suffix=".png", seg_map_suffix=".png", metainfo=dict(classes=("a", "b", "c"), palette=[[0], [1], [2]]),
    pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
)
train_dataloader = dict(batch_size=2, num_workers=0, dataset=data, sampler=dict(type="DefaultSampler", shuffle=True))
val_dataloader = dict(batch_size=1, num_workers=0, dataset=data, sampler=dict(type="DefaultSampler", shuffle=False))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    constructor="VMambaOptimWrapperConstructor", paramwise_cfg=dict(decay_rate=0.9),
)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=4, val_interval=4)
val_cfg, test_cfg = dict(type="ValLoop"), dict(type="TestLoop")
default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2))
randomness = dict(seed=0, deterministic=True)
"""


@pytest.fixture
def config(tmp_path):
    """A configuration of a small UPerNet and four images of 33 x 47 pixels."""
    generator = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        labels = generator.integers(3, size=(33, 47), dtype=np.uint8)
        Image.fromarray(np.stack([labels * 80] * 3, -1)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(labels).save(tmp_path / f"labels/{i}.png")
    path = tmp_path / "upernet.py"
    path.write_text(TEMPLATE.format(model=pprint.pformat(upernet(NAME, drop_path_rate=0.0)), root=str(tmp_path)))
    return path


def weights(path):
    return read(path)["state_dict"]


def test_train_resume_test(config, tmp_path, monkeypatch):
    """A run that is stopped after two steps and resumed ends where an unbroken one ends."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config)]) == 0
    whole = weights("work_dirs/upernet/iter_4.pth")
    assert any(key.startswith("backbone.pyramid.body.stem") for key in whole)
    short = ["--work-dir", "short", "--cfg-options", "train_cfg.max_iters=2", "param_scheduler=None"]
    assert main(["train", str(config), *short]) == 0
    assert not Path("short/iter_4.pth").exists()
    assert main(["train", str(config), "--work-dir", "short", "--resume"]) == 0
    resumed = weights("short/iter_4.pth")
    assert all(torch.allclose(t, whole[key], atol=1e-6) for key, t in resumed.items())
    head = "decode_head.conv_seg.weight"
    assert not torch.equal(resumed[head], weights("short/iter_2.pth")[head])
    assert main(["test", str(config), "short/iter_4.pth", "--out", "predictions.pkl"]) == 0
    predictions = pickle.loads(Path("predictions.pkl").read_bytes())
    assert [p["pred_sem_seg"]["data"].shape for p in predictions] == [(1, 33, 47)] * 4


def test_distributed_training_tells_its_usage():
    usage = subprocess.run(["bash", str(ROOT / "tools/dist_train.sh"), "config.py"], capture_output=True, text=True)
    assert usage.returncode == 2 and "usage" in usage.stderr


class Evil:
    """A pickle that makes a file when it is loaded by a reader that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("words", [["test"], ["train", "--cfg-options"]])
def test_checkpoints_run_no_code(config, capsys, tmp_path, monkeypatch, words):
    """mmengine would read such a file with everything in it allowed."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "meta": {}, "extra": Evil(tmp_path / "ran")}, "evil.pth")
    command, *options = words
    last = [*options, "load_from=evil.pth"] if options else ["evil.pth"]
    assert "could run code and are not loaded" in error_of(capsys, command, config, *last)
    assert not (tmp_path / "ran").exists()


def error_of(capsys, *words):
    assert main(list(map(str, words))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vmamba: error:")]
    return lines[-1].removeprefix("vmamba: error: ")


def test_mistakes_are_one_line(config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert error_of(capsys, "train", "nowhere.py") == "no configuration at nowhere.py"
    assert error_of(capsys, "test", config, "nowhere.pth") == "no checkpoint at nowhere.pth"
    assert "tools/dist_train.sh" in error_of(capsys, "train", config, "--launcher", "pytorch")
    assert "mmpretrain, which is not installed" in error_of(
        capsys, "train", config, "--cfg-options", "default_scope=mmpretrain"
    )
    Path("broken.py").write_text("model = dict(\n")
    assert error_of(capsys, "train", "broken.py").startswith("broken.py: ")
    Path("taken.pth").touch()
    assert "--tta needs tta_model and tta_pipeline" in error_of(capsys, "test", config, "taken.pth", "--tta")
    assert "must end in .pkl" in error_of(capsys, "test", config, "taken.pth", "--out", "predictions")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is nothing to refuse")
def test_mixed_precision_needs_a_gpu(config, capsys):
    assert error_of(capsys, "train", config, "--amp", "bfloat16").startswith("mixed precision needs a GPU")


def test_options_reach_the_runner(config, monkeypatch):
    seen = {}
    monkeypatch.setattr("vmamba.tools.train.runner", lambda cfg: seen.update(cfg=cfg) or Runs())
    options = ["--amp", "bfloat16", "--resume", "a.pth", "--cfg-options", "train_cfg.max_iters=7", "a.b=[1,2]"]
    assert main(["train", str(config), *options]) == 0
    cfg = seen["cfg"]
    assert cfg.optim_wrapper.type == "AmpOptimWrapper" and cfg.optim_wrapper.dtype == "bfloat16"
    assert cfg.resume and cfg.load_from == "a.pth" and cfg.train_cfg.max_iters == 7 and cfg.a.b == [1, 2]


class Runs:
    """A runner that does nothing."""

    def train(self):
        """Nothing."""


def test_doctor_finds_what_is_installed(config, capsys):
    found = toolboxes()
    assert {"mmengine", "mmcv", "mmdet", "mmseg"} <= found.keys() <= SUPPORTED.keys()
    assert not [problem for toolbox in found.values() for problem in toolbox.problems]
    assert f"mmcv {found['mmcv'].version}" in str(doctor())
    assert main(["doctor", "--config", str(config)]) == 0
    assert capsys.readouterr().out.strip().endswith("upernet.py: our networks are found")
    config.write_text(config.read_text().replace("custom_imports", "other_imports"))
    assert main(["doctor", "--config", str(config)]) == 1
    assert 'custom_imports = dict(imports=["vmamba.mm"]' in capsys.readouterr().out.splitlines()[-1]
    assert advice_on({"custom_imports": {"imports": ["vmamba.mm", "other"]}}) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'mmcv._ext'"), "it has no operators .*make mm"),
        (ImportError("_ext.so: undefined symbol: _ZN3c104impl"), "built for another PyTorch than 2"),
        (ImportError("libGL.so.1: cannot open shared object file"), "opencv-python-headless"),
        (AssertionError("MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.2.0."), "do not fit"),
        (ModuleNotFoundError("No module named 'pkg_resources'"), r"setuptools<81"),
        (AttributeError("_ARRAY_API not found"), "another NumPy"),
        (ModuleNotFoundError("No module named 'mmengine'"), r"OpenMMLab is not installed; pip install 'vmamba.mm"),
        (ModuleNotFoundError("No module named 'ftfy'"), "a package that it uses is not installed.*ftfy"),
        (RuntimeError("what?"), r"it cannot be imported \(it says: what\?\)"),
    ],
)
def test_failures_in_plain_words(error, words):
    assert re.search(words, explain(error))


def test_versions_and_doubles():
    assert _out_of_range("mmcv", "2.1.0") is None and _out_of_range("mmcv", "2.3.6") is None
    assert _out_of_range("mmcv", "1.7.2") == "mmcv must be 2.0 or newer and older than 3.0, but 1.7.2 is installed"
    assert _clash("mmcv", ("onedl-mmcv",)) is None
    assert "mmcv and onedl-mmcv both put mmcv into the same folder" in _clash("mmcv", ("mmcv", "onedl-mmcv"))


def test_a_broken_toolbox_is_named(config, capsys, monkeypatch):
    broken = {"mmseg": Toolbox("mmseg", "1.4.2", ("mmseg",), ("it has no operators",))}
    monkeypatch.setattr("vmamba.openmmlab.toolboxes", lambda: broken)
    monkeypatch.setattr(sys.modules["vmamba.doctor"], "toolboxes", lambda: broken)
    assert "  mmseg: it has no operators\n" in str(doctor())
    assert error_of(capsys, "train", config) == "mmseg: it has no operators"

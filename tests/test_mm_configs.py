"""Every configuration in ``configs``: short, explained, of the published size, and its network learns."""

import ast
import re
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS, init_default_scope
from torch import nn

from tests.mm_models import detection_batch, segmentation_batch
from tests.timm_zoo import shrunk
from vmamba.registry import entries
from vmamba.vit_adapter import ViTAdapter

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("[a-z]*/*.py"))
DATASETS = sorted((ROOT / "configs" / "_base_" / "datasets").glob("*.py"))
TABLE = (ROOT / "configs" / "README.md").read_text().splitlines()
TOLERANCE = 0.7  # of the last digit of a published count: they are rounded, Vim's upwards
SIDE, WIDTH = 64, 8
NARROW = {  # what a small head has in the place of a published one's width
    "feat_channels": WIDTH,
    "conv_out_channels": WIDTH,
    "fc_out_channels": 2 * WIDTH,
    "num": 16,
    "nms_pre": 50,
    "max_per_img": 20,
}


def name(path: Path) -> str:
    return path.stem


def read(path: Path) -> Config:
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    return cfg


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def build(model: Config) -> nn.Module:
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.build(model)


@cache
def full(path: Path) -> nn.Module:
    """The network at its full size, without memory for its weights."""
    with torch.device("meta"):
        return build(read(path).model)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def shrink(model: Config) -> Config:
    """A small network of the same kind: a small backbone, and heads that fit its channels."""
    entry, small = entries()[model.backbone.variant], shrunk(model.backbone.variant)
    settings = entry.settings
    if issubclass(entry.cls, ViTAdapter):
        small["heads"] = 4
    outputs = model.backbone.get("out_indices", settings.get("out_indices"))
    if outputs and "depth" in small:
        model.backbone.out_indices = tuple(i * small["depth"] // settings["depth"] for i in outputs)
    model.backbone.update(small)
    channels = build(model.backbone).channels
    if model.get("neck"):
        model.neck.update(in_channels=list(channels), out_channels=WIDTH)
        channels = (WIDTH,) * len(channels)
    if "decode_head" in model:
        model.data_preprocessor.size = (SIDE, SIDE)
        model.decode_head.update(in_channels=list(channels), channels=WIDTH)
    if "auxiliary_head" in model:
        model.auxiliary_head.update(in_channels=channels[2], channels=WIDTH)
    for part in ("rpn_head", "roi_head", "train_cfg"):
        narrow(model.get(part), {**NARROW, "in_channels": channels[0], "out_channels": channels[0]})
    return model


def narrow(node, values: dict) -> None:
    """Put ``values`` in the place of those under the same keys anywhere in ``node``."""
    if isinstance(node, dict):
        node.update({key: value for key, value in values.items() if key in node})
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        narrow(child, values)


def test_files_are_found():
    assert len(FILES) > 40 and len(DATASETS) == 4


@pytest.mark.parametrize("path", FILES, ids=name)
def test_text(path):
    text, doc = path.read_text(), docstring(path)
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 120
    relative = path.relative_to(ROOT)
    assert f"vmamba train {relative}\n" in doc and f"tools/dist_train.sh {relative} 8\n" in doc
    assert all(f"\n{field}: " in doc for field in ("Hardware", "Expected", "Source", "Parameters of the whole network"))
    assert not re.search(r"""["'](/|~|[a-z]:)|\.mim|::""", text)
    assert read(path).custom_imports["imports"] == ["vmamba.mm"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_size(path):
    """The heads fit the backbone; parameters are those published, and those of the table in README.md."""
    model, cfg = full(path), read(path).model
    channels, first = list(model.backbone.channels), cfg.get("neck") or cfg.get("decode_head")
    assert first is None or first.in_channels == channels
    assert "auxiliary_head" not in cfg or cfg.auxiliary_head.in_channels == channels[cfg.auxiliary_head.in_index]
    (row,) = (line for line in TABLE if f"]({path.relative_to(ROOT / 'configs')})" in line)
    *_, expected, counted, published = (cell.strip() for cell in row.strip("| ").split("|"))
    assert counted == f"{count(model):,}"
    doc = docstring(path)
    assert f"Expected: {expected}." in doc and f"Parameters of the whole network: {published} published." in doc
    if published.endswith("M"):
        digit = 10.0 ** -len(published[:-1].partition(".")[2])
        assert abs(count(model) / 1e6 - float(published[:-1])) <= TOLERANCE * digit
    elif published != "none":
        assert counted == published


def test_upernet_heads():
    """UPerNet adds as many parameters to a backbone of 96 to 768 channels as the original's (VMamba's README)."""
    model = full(ROOT / "configs/segmentation/upernet_vmamba_tiny_s1l8_ade20k_160k.py")
    assert count(model.decode_head) + count(model.auxiliary_head) == 32_421_164


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_step_of_training(path):
    cfg = read(path)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build(shrink(cfg.model)))
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = detection_batch if cfg.default_scope == "mmdet" else segmentation_batch
    losses = model.train().train_step(batch((SIDE, SIDE), (SIDE, SIDE)), wrapper)
    assert losses and all(value.isfinite() for value in losses.values())
    assert losses["loss"] > 0


@pytest.mark.parametrize("path", FILES, ids=name)
def test_schedule(path):
    """The learning rate warms up, and its schedule ends with the training."""
    cfg = read(path)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [PARAM_SCHEDULERS.build({**item, "optimizer": optimizer}) for item in cfg.param_scheduler]
    loop, last = cfg.train_cfg, cfg.param_scheduler[-1]
    assert last["end"] == loop.get("max_iters", loop.get("max_epochs"))
    assert (
        last["by_epoch"] == (loop.type == "EpochBasedTrainLoop") == cfg.get("log_processor", {}).get("by_epoch", True)
    )
    assert len(schedulers) == 1 or optimizer.param_groups[0]["lr"] < 0.01 * cfg.optim_wrapper.optimizer.lr


@pytest.mark.parametrize("path", DATASETS, ids=name)
def test_pipelines(path, tmp_path):
    """An image with its annotations passes the transforms of training and of testing."""
    segmentation = path.stem == "ade20k"
    init_default_scope("mmseg" if segmentation else "mmdet")
    cfg, pixels = Config.fromfile(path), np.random.default_rng(0).integers(1, 3, (60, 90), dtype=np.uint8)
    for file, content in (("image.png", np.repeat(pixels[..., None] * 80, 3, 2)), ("labels.png", pixels)):
        assert cv2.imwrite(str(tmp_path / file), content)
    box = {"bbox": [5, 5, 60, 50], "bbox_label": 1, "mask": [[5, 5, 60, 5, 60, 50, 5, 50]], "ignore_flag": 0}
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        with TRANSFORMS.switch_scope_and_registry(None) as registry:
            pipeline = [registry.build(transform) for transform in loader.dataset.pipeline]
        sample = dict(img_path=str(tmp_path / "image.png"), img_id=0, instances=[box], height=60, width=90)
        if segmentation:
            sample |= dict(seg_map_path=str(tmp_path / "labels.png"), reduce_zero_label=True, seg_fields=[])
        for transform in pipeline:
            sample = transform(sample)
            if sample is None:
                break  # a crop without objects: the data set draws another image
        assert sample is None or sample["inputs"].shape[0] == 3
        assert sample is not None or loader is cfg.train_dataloader

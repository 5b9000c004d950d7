"""Every published configuration in ``configs``: short, explained, of the published size and cost; it learns."""

import ast
import re
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

from tests.mm_models import classification_batch, detection_batch, segmentation_batch
from tests.timm_zoo import shrunk
from vmamba.mm.complexity import count as multiply_adds
from vmamba.registry import entries
from vmamba.vit_adapter import ViTAdapter

ROOT = Path(__file__).parents[1]
BATCHES = {
    "classification": classification_batch,
    "detection": detection_batch,
    "segmentation": segmentation_batch,
}
FILES = sorted(path for task in BATCHES for path in (ROOT / "configs" / task).glob("*.py"))
DATASETS = sorted((ROOT / "configs" / "_base_" / "datasets").glob("[!i]*.py"))  # test_mm_classifier.py has ImageNet
TABLE = (ROOT / "configs" / "README.md").read_text().splitlines()
TOLERANCE = 0.7  # of the last digit of a published count: they are rounded, Vim's upwards
SIZES = {"classification": (224, 224), "detection": (800, 1280), "segmentation": (512, 2048)}  # costs are published for
COUNTED = [  # one of every head and kind of backbone; the rest of the table is the same code
    "classifier_vmamba_tiny_s1l8_imagenet_300e",
    "cascade_mask_rcnn_vim_tiny_patch16_det_coco_lsj",
    "mask_rcnn_vmamba_tiny_s1l8_coco_1x",
    "mask_rcnn_ppma_tiny_coco_1x",
    "retinanet_mobilemamba_b1_coco_1x",
    "ssdlite_mobilemamba_b1_coco_320",
    "deeplabv3_mobilemamba_b4_ade20k_80k",
    "pspnet_mobilemamba_b4_ade20k_80k",
    "semantic_fpn_mobilemamba_b4_ade20k_160k",
    "upernet_vmamba_tiny_s1l8_ade20k_160k",
    "upernet_vmamba_tiny_s1l8_cityscapes_160k",
]
NETWORKS: dict[str, nn.Module] = {}  # built already, by what their configurations say
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


def full(path: Path) -> nn.Module:
    """The network at its full size, without memory for its weights; schedules of the same network share it."""
    model = read(path).model
    if str(model) not in NETWORKS:
        with torch.device("meta"):
            NETWORKS[str(model)] = build(model)
    return NETWORKS[str(model)]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def row(path: Path) -> list[str]:
    """Cells of the configuration's row in README.md."""
    (line,) = (line for line in TABLE if f"]({path.relative_to(ROOT / 'configs')})" in line)
    return [cell.strip() for cell in line.strip("| ").split("|")]


def agrees(number: float, published: str, *, unit: float = 1.0) -> bool:
    """Whether a count is the published one: to the digit, or within the rounding of the figure in ``unit``."""
    if "," in published:
        return f"{number:,}" == published
    figure = published.removesuffix("M")
    return abs(number / unit - float(figure)) <= TOLERANCE * 10.0 ** -len(figure.partition(".")[2])


def wanted(head: Config, channels) -> list[int]:
    """The widths of the maps that a neck or a head takes."""
    index = head.get("in_index", range(len(channels)))
    return [channels[i] for i in ([index] if isinstance(index, int) else index)]


def taken(head: Config) -> list[int]:
    return [head.in_channels] if isinstance(head.in_channels, int) else list(head.in_channels)


def shrink_backbone(backbone: Config) -> tuple[int, ...]:
    """Put a small backbone of the same kind there; returns its channels."""
    entry, small = entries()[backbone.variant], shrunk(backbone.variant)
    settings = entry.settings
    if issubclass(entry.cls, ViTAdapter):
        small["heads"] = 4
    outputs = backbone.get("out_indices", settings.get("out_indices"))
    if outputs and "depth" in small:
        backbone.out_indices = tuple(i * small["depth"] // settings["depth"] for i in outputs)
    backbone.update(small)
    return build(backbone).channels


def shrink(model: Config) -> Config:
    """A small network of the same kind: a small backbone, and heads that fit its channels."""
    if "backbone" not in model:
        model.update(shrunk(model.variant), num_classes=5)
        return model
    channels = shrink_backbone(model.backbone)
    if model.get("neck"):
        more = len(model.neck.get("level_strides", ()))  # levels that SSD's neck adds
        widths = (*channels, *[WIDTH] * more)
        model.neck.update(in_channels=type(model.neck.in_channels)(channels), out_channels=widths if more else WIDTH)
        channels = widths if more else (WIDTH,) * len(channels)
    if "size" in model.data_preprocessor:
        model.data_preprocessor.size = (SIDE, SIDE)
    for head in (model.get("decode_head"), model.get("auxiliary_head")):
        if head:
            several = isinstance(head.in_channels, list)
            head.update(in_channels=wanted(head, channels)[: None if several else 1], channels=WIDTH)
            head.in_channels = head.in_channels if several else head.in_channels[0]
    first = channels if model.type == "SingleStageDetector" else channels[0]
    for part in ("rpn_head", "roi_head", "bbox_head", "train_cfg"):
        narrow(model.get(part), {**NARROW, "in_channels": first, "out_channels": channels[0]})
    return model


def narrow(node, values: dict) -> None:
    """Put ``values`` in the place of those under the same keys anywhere in ``node``."""
    if isinstance(node, dict):
        node.update({key: value for key, value in values.items() if key in node})
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        narrow(child, values)


def test_files_are_found():
    assert len(FILES) > 70 and len(DATASETS) == 9


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
    parts = ("neck",) if cfg.get("neck") else ("decode_head", "auxiliary_head")
    for head in [cfg[part] for part in parts if part in cfg]:
        assert taken(head) == wanted(head, model.backbone.channels)
    *_, expected, counted, published, _, _ = row(path)
    assert counted == f"{count(model):,}"
    doc = docstring(path)
    assert f"Expected: {expected}." in doc and f"Parameters of the whole network: {published} published." in doc
    if published != "none":
        figure, _, remark = published.partition(" ")
        more = re.match(r"\(([\d,]+) of them", remark)
        extra = int(more[1].replace(",", "")) if more else 0
        assert agrees(count(model) + extra, figure, unit=1e6) != (remark == "(not this network's)")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_table_of_costs(path):
    """Where a figure is published, the count that the table has beside it agrees, or the table says why not."""
    counted, published = row(path)[-2:]
    figure, _, remark = published.partition(" ")
    if figure != "none" and "without" not in remark:
        assert agrees(float(counted.split()[0]), figure) != (remark == "(differs)")


@pytest.mark.parametrize("path", [path for path in FILES if path.stem in COUNTED], ids=name)
def test_cost(path):
    """Multiply-adds are those of the table; without batched products they are the published ones where it says so."""
    counted, published = row(path)[-2:]
    figure, _, size = counted.partition(" at ")
    sides = tuple(map(int, size.split(" x "))) if size else SIZES[path.parent.name]
    if "cityscapes" in path.stem:
        sides = (1024, 2048)
    cost = multiply_adds(full(path).eval(), sides)
    assert f"{sum(cost.values()) / 1e9:.{len(figure.partition('.')[2])}f}" == figure
    if "without" in published:
        assert agrees((sum(cost.values()) - cost["batched products"]) / 1e9, published.split()[0])


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
    batch = BATCHES[path.parent.name]((SIDE, SIDE), (SIDE, SIDE))
    losses = model.train().train_step(batch, wrapper)
    assert losses and all(value.isfinite() for value in losses.values())
    assert losses["loss"] > 0


@pytest.mark.parametrize("path", FILES, ids=name)
def test_schedule(path):
    """The learning rate warms up, and its schedule ends with the training."""
    cfg = read(path)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=cfg.optim_wrapper.optimizer.lr)
    common = dict(optimizer=optimizer, epoch_length=100)
    schedulers = [PARAM_SCHEDULERS.build({**item, **common}) for item in cfg.param_scheduler]
    loop, last = cfg.train_cfg, cfg.param_scheduler[-1]
    assert last["end"] == loop.get("max_iters", loop.get("max_epochs"))
    assert (
        last["by_epoch"] == (loop.type == "EpochBasedTrainLoop") == cfg.get("log_processor", {}).get("by_epoch", True)
    )
    assert len(schedulers) == 1 or optimizer.param_groups[0]["lr"] < 0.01 * cfg.optim_wrapper.optimizer.lr


@pytest.mark.parametrize("path", DATASETS, ids=name)
def test_pipelines(path, tmp_path):
    """An image with its annotations passes the transforms of training and of testing."""
    segmentation = path.stem.startswith(("ade20k", "cityscapes"))
    init_default_scope("mmseg" if segmentation else "mmdet")
    cfg, pixels = Config.fromfile(path), np.random.default_rng(0).integers(1, 3, (60, 90), dtype=np.uint8)
    for file, content in (("image.png", np.repeat(pixels[..., None] * 80, 3, 2)), ("labels.png", pixels)):
        assert cv2.imwrite(str(tmp_path / file), content)
    box = {"bbox": [5, 5, 60, 50], "bbox_label": 1, "mask": [[5, 5, 60, 5, 60, 50, 5, 50]], "ignore_flag": 0}
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        with TRANSFORMS.switch_scope_and_registry(None) as registry:
            images = loader.dataset.get("dataset", loader.dataset)
            pipeline = [registry.build(transform) for transform in images.pipeline]
        sample = dict(img_path=str(tmp_path / "image.png"), img_id=0, instances=[box], height=60, width=90)
        if segmentation:
            zero = path.stem.startswith("ade20k")
            sample |= dict(seg_map_path=str(tmp_path / "labels.png"), reduce_zero_label=zero, seg_fields=[])
        for transform in pipeline:
            sample = transform(sample)
            if sample is None:
                break  # a crop without objects: the data set draws another image
        assert sample is None or sample["inputs"].shape[0] == 3
        assert sample is not None or loader is cfg.train_dataloader

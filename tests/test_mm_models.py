"""UPerNet and Mask R-CNN around our backbones: a training step and a prediction on odd sizes."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

import vmamba.mm  # noqa: F401
from tests.mm_models import detection_batch, mask_rcnn, segmentation_batch, upernet

SIZES = [((31, 31), (31, 31)), ((112, 137), (112, 137))]


def build(cfg: dict, scope: str):
    init_default_scope(scope)
    torch.manual_seed(0)
    with MODELS.switch_scope_and_registry(scope) as registry:
        model = registry.build(Config({"model": cfg}).model)
    model.init_weights()
    return model


def step(model, batch: dict) -> dict:
    """One step of AdamW; returns the losses. Every parameter must have moved or be at rest by a zero gradient."""
    optimizer = {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.05}
    cfg = {"optimizer": optimizer, "constructor": "VMambaOptimWrapperConstructor", "paramwise_cfg": {"decay_rate": 0.9}}
    wrapper = build_optim_wrapper(model, {"type": "OptimWrapper", **cfg})
    assert isinstance(wrapper, OptimWrapper)
    before = {key: p.detach().clone() for key, p in model.backbone.named_parameters()}
    losses = model.train().train_step(batch, wrapper)
    assert all(value.isfinite() for value in losses.values())
    still = [key for key, p in model.backbone.named_parameters() if torch.equal(p, before[key])]
    assert len(still) < len(before) / 10, still
    return losses


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vim_tiny_patch16_seg", "efficientvmamba_tiny"])
@pytest.mark.parametrize("sizes", SIZES)
def test_upernet(name, sizes):
    model = build(upernet(name, drop_path_rate=0.0), "mmseg")
    losses = step(model, segmentation_batch(*sizes))
    assert {"decode.loss_ce", "aux.loss_ce"} <= losses.keys()
    with torch.no_grad():
        (result,) = model.eval().test_step(segmentation_batch(sizes[0]))
    assert result.pred_sem_seg.data.shape == (1, *sizes[0]) and result.pred_sem_seg.data.max() < 3


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vim_tiny_patch16_224"])
@pytest.mark.parametrize("sizes", [*SIZES, ((64, 96), (95, 40))])
def test_mask_rcnn(name, sizes):
    model = build(mask_rcnn(name, drop_path_rate=0.0), "mmdet")
    losses = step(model, detection_batch(*sizes))
    assert {"loss_cls", "loss_mask", "loss_rpn_cls"} <= losses.keys()
    with torch.no_grad():
        results = model.eval().test_step(detection_batch(*sizes))
    for size, result in zip(sizes, results, strict=True):
        assert result.pred_instances.masks.shape[1:] == size and result.pred_instances.bboxes.isfinite().all()


def test_an_image_without_objects():
    model = build(mask_rcnn("vmamba_tiny_s1l8"), "mmdet")
    losses = step(model, detection_batch((33, 64), (33, 64), boxes=0))
    assert losses["loss_mask"] == 0 and losses["loss_bbox"] == 0


def test_official_names_in_published_detectors(tmp_path):
    """A checkpoint with the original's names under ``backbone.`` loads into a detector, whose head keeps its own."""
    from mmengine.runner import load_checkpoint

    from tests.official_vmamba import official

    model = build(mask_rcnn("vmamba_tiny_s1l8"), "mmdet")
    state = {key: t + 1 for key, t in model.state_dict().items() if not key.startswith("backbone.")}
    body = model.backbone.pyramid.body
    ours = {key: t + 1 for key, t in official(body).items()}
    for i, norm in enumerate(model.backbone.pyramid.norms):
        ours |= {f"outnorm{i}.{key}": t + 1 for key, t in norm.state_dict().items()}
    state |= {f"backbone.{key}": t for key, t in ours.items()}
    expected = {key: t + 1 for key, t in model.state_dict().items()}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "published.pth")
    load_checkpoint(model, str(tmp_path / "published.pth"), strict=True)
    assert all(torch.equal(t, expected[key]) for key, t in model.state_dict().items())

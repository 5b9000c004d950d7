"""RoIAlign and NMS of detectors in bfloat16, and torchvision's in the place of mmcv's."""

import pytest
import torch
from mmcv.ops import nms, roi_align

from tests.mm_models import detection_batch, mask_rcnn
from tests.test_mm_models import build
from vmamba.mm import operators


def boxes(count: int, side: float) -> torch.Tensor:
    torch.manual_seed(0)
    corners = torch.rand(count, 2) * side
    return torch.cat([corners, corners + torch.rand(count, 2) * side / 2 + 0.5], 1)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align(samples, aligned):
    """Values and gradients of torchvision's operator through mmcv's function are those of mmcv's."""
    maps, rois = torch.randn(2, 3, 19, 23), boxes(7, 60.0)
    rois = torch.cat([torch.arange(7)[:, None] % 2, rois], 1)
    results = []
    for replacements in ({}, operators.REPLACEMENTS):
        x, functions = maps.clone().requires_grad_(), pytest.MonkeyPatch()
        for name, operator in replacements.items():
            functions.setattr(f"mmcv._ext.{name}", operator)
        y = roi_align(x, rois, (5, 4), 0.25, samples, "avg", aligned)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        functions.undo()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(*(y for y, _ in results), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(gradient for _, gradient in results), rtol=1e-4, atol=1e-3)
    assert results[0][0].std() > 0.1


@pytest.mark.parametrize("offset", [0, 1])
def test_nms(offset, monkeypatch):
    candidates, scores = boxes(200, 40.0), torch.rand(200)
    kept, expected = nms(candidates, scores, 0.4, offset=offset)
    monkeypatch.setattr("mmcv._ext.nms", operators._nms)
    again, ours = nms(candidates, scores, 0.4, offset=offset)
    assert torch.equal(ours, expected) and torch.equal(again, kept) and 10 < len(expected) < 190


def test_maxima_are_refused():
    with pytest.raises(NotImplementedError, match="take pool_mode='avg'"):
        operators._settings({"pool_mode": 0})


@pytest.fixture
def untouched(monkeypatch):
    """mmcv's own operators, again after the test."""
    import mmcv._ext as ext

    for name in operators.REPLACEMENTS:
        monkeypatch.setattr(ext, name, getattr(getattr(ext, name), "original", getattr(ext, name)))
    return ext


@pytest.mark.parametrize("compiled", [True, False])
def test_a_gpu_takes_what_there_is(untouched, monkeypatch, compiled):
    """Tensors of the CPU keep mmcv's operators, those of a GPU have torchvision's if mmcv lacks CUDA."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    original, calls = untouched.nms, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(operators, "_runs_on_gpu", lambda nms: compiled)
    monkeypatch.setitem(operators.REPLACEMENTS, "nms", lambda *tensors, **options: calls.append("torchvision"))
    monkeypatch.setattr(untouched, "nms", lambda *tensors, **options: calls.append("mmcv"))
    assert operators.patch() == operators.patch() == compiled
    for candidates in (boxes(3, 9.0), boxes(3, 9.0).as_subclass(OnGPU)):
        untouched.nms(candidates, torch.rand(3), iou_threshold=0.5, offset=0)
    assert calls == ["mmcv", "mmcv" if operators.patch() else "torchvision"]
    assert original is not untouched.nms and not hasattr(untouched.nms.original, "original")


def test_bfloat16(untouched):
    """A detector that trains under autocast: mmcv's NMS and RoIAlign alone refuse."""
    model = build(mask_rcnn("vmamba_tiny_s1l8", drop_path_rate=0.0), "mmdet").train()
    data = model.data_preprocessor(detection_batch((64, 96), (95, 40)), training=True)
    torch.manual_seed(1)
    expected = model(**data, mode="loss")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="BFloat16"):
            model(**data, mode="loss")
        operators.patch()
        with pytest.raises(RuntimeError, match=r"ROIAlign_forward.*not implemented for 'BFloat16'"):
            model(**data, mode="loss")
        runner = type("Runner", (), {"model": model})
        for _ in range(2):
            operators.DetectorOperatorsHook().before_run(runner)
        torch.manual_seed(1)
        losses = model(**data, mode="loss")
    sum(value if torch.is_tensor(value) else sum(value) for key, value in losses.items() if "loss" in key).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert {"loss_mask", "loss_bbox"} <= losses.keys()
    first = [sum(found["loss_rpn_cls"]).item() for found in (losses, expected)]  # the same anchors are drawn
    assert first[0] == pytest.approx(first[1], rel=0.02)
    assert len(model.roi_head.bbox_roi_extractor._forward_pre_hooks) == 1


def test_ssd_predicts():
    """mmdet 3.2 and later ask the head of an SSD for a loss that it does not have."""
    from mmdet.models.dense_heads import SSDHead

    operators.let_ssd_predict()
    assert SSDHead.loss_cls is None

"""RoIAlign and NMS of detectors in every precision and on every device.

mmcv's RoIAlign has no bfloat16, in which the coordinates of boxes would lose their last pixels anyway, nor has its NMS;
and mmcv built without a CUDA compiler has no operators for GPUs at all. With the hook
``custom_hooks = [dict(type="DetectorOperatorsHook")]`` both compute in float32, under mixed precision too, and are
torchvision's where mmcv has none.
"""

from collections.abc import Callable
from typing import Any

import torch
import torchvision.ops  # noqa: F401  makes torch.ops.torchvision
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from torch import Tensor, nn


@HOOKS.register_module()
class DetectorOperatorsHook(Hook):
    """Lets a detector run with ``AmpOptimWrapper`` of any dtype, and on a GPU with an mmcv built for the CPU alone."""

    def before_run(self, runner) -> None:
        """Prepares the runner's model, and mmcv and mmdet for this process."""
        full_precision(runner.model)
        let_ssd_predict()
        if not patch() and torch.cuda.is_available():
            print_log("mmcv was built without CUDA; RoIAlign and NMS are torchvision's", logger="current")


def full_precision(model: nn.Module) -> None:
    """Give every extractor of regions of ``model`` its maps, and so its boxes, in float32."""
    for module in model.modules():
        if hasattr(module, "roi_layers") and _to_float not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_to_float)


def _to_float(module: nn.Module, inputs: tuple) -> tuple:
    maps, *others = inputs
    return (tuple(m.float() for m in maps), *others)


def let_ssd_predict() -> None:
    """Give mmdet's SSDHead the attribute that predictions ask of every head (mmdetection's issue 11063)."""
    from mmdet.models.dense_heads import SSDHead

    if not hasattr(SSDHead, "loss_cls"):
        setattr(SSDHead, "loss_cls", None)  # noqa: B010  its class does not declare it


def patch() -> bool:
    """Let mmcv's NMS take scores of any dtype, and GPUs have torchvision's operators if mmcv lacks CUDA.

    Returns:
        Whether mmcv has CUDA.
    """
    from mmcv.utils import ext_loader

    operators: Any = ext_loader.load_ext("_ext", list(REPLACEMENTS))
    cuda = torch.cuda.is_available() and _runs_on_gpu(operators.nms)
    for name, replacement in REPLACEMENTS.items():
        original = getattr(operators, name)
        if not hasattr(original, "original"):
            setattr(operators, name, _by_device(original, None if cuda else replacement, cast=name in IN_FLOATS))
    return cuda


def _runs_on_gpu(nms: Callable) -> bool:
    """Whether mmcv has operators for GPUs: tried, since asking for the CUDA that it was built with can crash it."""
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device="cuda")
    try:
        nms(boxes, boxes[:, 2], iou_threshold=0.5, offset=0)
    except RuntimeError:
        return False
    return True


def _by_device(original: Callable, on_gpu: Callable | None, cast: bool = False) -> Callable:
    """``on_gpu`` for tensors of a GPU, if there is one; else ``original``, its tensors in float32 if ``cast``."""

    def operator(*tensors: Tensor, **options: Any) -> Any:
        chosen = on_gpu if on_gpu and tensors[0].is_cuda else original
        return chosen(*(t.float() if cast else t for t in tensors), **options)

    operator.original = original  # type: ignore[attr-defined]
    return operator


def _nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    """(n, 4), (n,) -> numbers of the boxes that stay, best first."""
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def _roi_align(maps: Tensor, rois: Tensor, output: Tensor, *unused: Tensor, **options: Any) -> None:
    """Fills ``output`` (n, c, height, width)."""
    scale, height, width, samples, aligned = _settings(options)
    pooled = torch.ops.torchvision.roi_align(maps.float(), rois.float(), scale, height, width, samples, aligned)
    output.copy_(pooled)


def _roi_align_backward(grad: Tensor, rois: Tensor, y: Tensor, x: Tensor, into: Tensor, **options: Any) -> None:
    """Fills ``into`` (b, c, h, w)."""
    scale, height, width, samples, aligned = _settings(options)
    into.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad.float(), rois.float(), scale, height, width, *into.shape, samples, aligned
        )
    )


def _settings(options: dict) -> tuple[float, int, int, int, bool]:
    """mmcv's names of options in torchvision's order.

    Raises:
        NotImplementedError: the maximum is asked for, which torchvision lacks.
    """
    if options["pool_mode"] != 1:
        raise NotImplementedError("RoIAlign with pool_mode='max' needs mmcv built with CUDA; take pool_mode='avg'")
    names = ("spatial_scale", "aligned_height", "aligned_width", "sampling_ratio", "aligned")
    scale, height, width, samples, aligned = (options[name] for name in names)
    return float(scale), int(height), int(width), int(samples), bool(aligned)


IN_FLOATS = ("nms",)  # they return no floating-point numbers, so their results are as they were
REPLACEMENTS = {"nms": _nms, "roi_align_forward": _roi_align, "roi_align_backward": _roi_align_backward}

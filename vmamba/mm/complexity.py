"""Multiply-adds of detectors, segmentors and classifiers, and of our operators in mmengine's own counter.

:func:`count` finds them from shapes alone, as ``vmamba.flops`` does and in its convention, so nothing is computed: not
even proposals, of which as many are taken as ``get_flops.py`` of mmdet has at most: the published figures are its. As
there, bilinear resizing of maps counts too, 4 per number.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.analysis import complexity_analysis
from torch import Tensor, nn

from vmamba import flops
from vmamba.flops import FORMULAS

MASKS = 100  # regions that get a mask: the first of the proposals, for each head (mmdet's RoI heads)


def count(model: nn.Module, size: Sequence[int]) -> dict[str, int]:
    """Multiply-adds for one image of ``size``, (h, w), by kind of operation, without auxiliary heads.

    Products of many small matrices, as attention has them, are a kind of their own: some published figures lack them.

    Args:
        model: a detector of mmdet, a segmentor of mmseg or a ``VMambaClassifier``, in eval mode; on any device.
        size: height and width, divisible by whatever the model pads images to.

    Raises:
        TypeError: the model has none of the heads that this knows; ValueError: it does not take that size.
    """
    return flops.count(_Forward(model), (1, 3, *size), also=KINDS)


class _Forward(nn.Module):
    """Image (1, 3, h, w) -> what the heads of a model make of it, without sampling, suppression or pasting."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.parts = [part for name, part in PARTS.items() if getattr(model, name, None) is not None]
        if not self.parts:
            raise TypeError(f"{type(model).__name__} has none of {', '.join(PARTS)}, whose cost could be counted")

    def forward(self, x: Tensor) -> None:
        """(1, 3, h, w)"""
        maps = self.model.extract_feat(x) if hasattr(self.model, "extract_feat") else x
        for part in self.parts:
            part(self.model, maps)


def _regions(model: Any, maps: Sequence[Tensor]) -> None:
    """The heads of regions, all of a cascade's, on as many proposals as there are at most."""
    roi = model.roi_head
    for kind, number in (("bbox", model.test_cfg.rpn.max_per_img), ("mask", MASKS)):
        heads, extractors = (_each(getattr(roi, f"{kind}_{part}", None)) for part in ("head", "roi_extractor"))
        for head, extractor in zip(heads, extractors, strict=True):
            side = extractor.roi_layers[0].output_size
            head(maps[0].new_empty(number, extractor.out_channels, *side))


def _each(module: Any) -> Sequence[Any]:
    """The modules of a list, a module alone as one of them, or none."""
    return [] if module is None else list(module) if isinstance(module, nn.ModuleList) else [module]


KINDS: flops.Formulas = {  # beside those of vmamba.flops
    torch.ops.aten.bmm: ("batched products", lambda x, y, **options: math.prod(x) * y[-1]),
    torch.ops.aten.baddbmm: ("batched products", lambda bias, x, y, **options: math.prod(x) * y[-1]),
    torch.ops.aten.upsample_bilinear2d: ("resizing", lambda *args, out_shape, **options: 4 * math.prod(out_shape)),
}
PARTS: dict[str, Callable[[Any, Any], Any]] = {  # attribute of a model -> what it does with the maps
    "rpn_head": lambda model, maps: model.rpn_head(maps),
    "roi_head": _regions,
    "bbox_head": lambda model, maps: model.bbox_head(maps),
    "decode_head": lambda model, maps: model.decode_head(maps),
    "network": lambda model, x: model.network(x),
}


def register() -> None:
    """Add the operators of ``vmamba.flops`` to those that mmengine counts: 1 per multiply-add, as its own."""
    formulas = {op._qualified_op_name: formula for op, (_, formula) in FORMULAS.items()}
    ours = {name: _handle(formula) for name, formula in formulas.items() if name.startswith("vmamba::")}
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(ours)


def _handle(formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
    def count(inputs: list[Any], outputs: list[Any]) -> int:
        return formula(*map(_shape, inputs), out_shape=_shape(outputs[0]))

    return count


def _shape(value: Any) -> "tuple[int, ...] | None":
    """Shape of a tensor in a traced graph; None for anything else."""
    return tuple(value.type().sizes()) if value.isCompleteTensor() else None

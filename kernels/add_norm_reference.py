"""A residual stream and its norm by PyTorch, with gradients, for any tensor; the equation is in ``add_norm``."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Norm(NamedTuple):
    """A norm over the last axis: weight (c,), bias (c,) or None, eps, and whether the mean is taken off (LayerNorm)."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool


def why_not(*tensors: Tensor) -> str | None:
    """None: PyTorch takes every device and floating-point type."""
    return None


def forward(h: Tensor, r: Tensor | None, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h, r (..., c) -> x (..., c) in ``dtype`` and the stream (..., c), both computed in float32 at least."""
    stream = h.to(torch.promote_types(h.dtype, torch.float32)) if r is None else r + h
    weight, bias = (None if t is None else t.to(stream.dtype) for t in (norm.weight, norm.bias))
    if norm.centred:
        return F.layer_norm(stream, stream.shape[-1:], weight, bias, norm.eps).to(dtype), stream
    return F.rms_norm(stream, stream.shape[-1:], weight, norm.eps).to(dtype), stream

"""Layer normalisation (arXiv:1607.06450) by PyTorch, over the last axis: (x - mean) / sqrt(var + eps) weight + bias."""

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST = 0  # numbers; smaller maps are left to PyTorch


def why_not(*tensors: Tensor) -> str | None:
    """None: PyTorch takes every device and floating-point type."""
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., c) -> (..., c) in ``dtype``, computed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y.to(dtype)

"""A branch, a residual stream and its norm by PyTorch, for any tensor; the equation is in ``residual_norm``."""

import torch
from torch import Tensor
from torch.nn import functional as F


def why_not(*tensors: Tensor) -> str | None:
    """None: any tensor will do."""
    return None


def _expanded(factor: Tensor, x: Tensor) -> Tensor:
    return factor.view(-1, *(1,) * (x.ndim - 1)).to(x.dtype)


def forward(
    x: Tensor,
    branch: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y (..., c) in ``dtype``, and the stream (..., c); x itself where there is no branch."""
    stream = x
    if branch is not None:
        added = branch.to(x.dtype)
        stream = x + (added if factor is None else added * _expanded(factor, x))
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(stream.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y.to(dtype), stream


def backward(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, factor: Tensor | None, weight: Tensor, eps: float,
    added: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the branch in its type ``added`` (x's where that is None), and of weight and bias, (2, c)."""
    wide = torch.promote_types(stream.dtype, torch.float32)
    x, g = stream.to(wide), dy.to(wide)
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal, gw = centred * scale, g * weight.to(wide)
    dx = (gw - gw.mean(-1, keepdim=True) - normal * (gw * normal).mean(-1, keepdim=True)) * scale
    dx = dx if dstream is None else dx + dstream
    dbranch = dx if factor is None else dx * _expanded(factor, dx)
    sums = torch.stack([g * normal, g]).flatten(1, -2).sum(1)
    return dx.to(stream.dtype), dbranch.to(added or stream.dtype), sums

"""The meaning of the causal depthwise convolution, in PyTorch, in any precision.

y[t] = silu(bias + sum_j weight[j] x[t - (w - 1) + j])          x[t < 0] = initial states, or 0
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def why_not(*tensors: Tensor) -> str | None:
    """None: the reference takes every device and floating-point type."""
    return None


def reference(x, weight, bias=None, initial=None, silu=False):
    """x (b, d, l), weight (d, w), bias (d,), initial (b, d, w - 1) -> y (b, d, l) in x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length, w = x.shape[2], weight.shape[1]
    inputs = F.pad(x, (w - 1, 0)) if initial is None else torch.cat([initial.to(x.dtype), x], 2)
    y = torch.zeros_like(x, dtype=dtype) if bias is None else bias.to(dtype)[:, None]
    for j in range(w):
        y = y + inputs[..., j : j + length].to(dtype) * weight[:, j, None].to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


def forward(*args) -> Tensor:
    """y; the arguments as in :func:`reference`."""
    return reference(*args)


def backward(dy: Tensor, *args) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, initial (None where the input is None) by automatic differentiation."""
    return gradients(reference, dy, *args)


def gradients(function, dy: Tensor, *args) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(x, weight, bias, initial, silu)`` with respect to those of its tensors that are there."""
    *tensors, silu = args

    def y_of(*present: Tensor) -> Tensor:
        given = iter(present)
        return function(*(None if t is None else next(given) for t in tensors), silu)

    grads = iter(torch.func.vjp(y_of, *(t for t in tensors if t is not None))[1](dy))
    return tuple(None if t is None else next(grads) for t in tensors)

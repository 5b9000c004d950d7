"""Instance normalisation by a backend's two kernels, with its gradients: what CUDA C++ and Triton share.

A backend has ``run_forward(x, residual, weight, bias, eps, slope) -> y, statistics`` and
``run_backward(dy, x, y, weight, bias, statistics, slope, added) -> dx, dresidual, dbias, dweight``. The last two are
(b, c); y is None where its sign is not needed; ``added`` is the residual's type where dresidual is asked for, and it is
not dy itself.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vmamba.kernels.instance_norm import FORMATS, is_channels_last


def normalised(
    backend: ModuleType,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float,
) -> Tensor:
    """x (b, c, *grid), residual of its shape, weight and bias (c,) -> (b, c, *grid), laid out as x.

    Differentiable once.
    """
    x = laid_as(x, x)
    residual = None if residual is None else laid_as(residual, x)
    weight, bias = (None if t is None else t.float().contiguous() for t in (weight, bias))
    inputs = x, residual, weight, bias, eps, slope
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs[:4]]):
        return _InstanceNorm.apply(backend, *inputs)
    return backend.run_forward(*inputs)[0]


def laid_as(x: Tensor, like: Tensor) -> Tensor:
    """x, contiguous or channels-last as ``like`` is."""
    return x.contiguous(memory_format=FORMATS[like.ndim]) if is_channels_last(like) else x.contiguous()


class _InstanceNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: ModuleType, *inputs: Any) -> Tensor:
        x, residual, weight, bias, _, ctx.slope = inputs
        y, stats = backend.run_forward(*inputs)
        ctx.backend, ctx.added = backend, None if residual is None else residual.dtype
        ctx.save_for_backward(x, None if residual is None or ctx.slope == 1 else y, weight, bias, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, stats = ctx.saved_tensors
        dy, wanted = laid_as(dy, x), ctx.needs_input_grad[2]
        masked = wanted and ctx.slope != 1
        added = ctx.added if masked else None
        dx, dresidual, dbias, dweight = ctx.backend.run_backward(dy, x, y, weight, bias, stats, ctx.slope, added)
        dresidual = dresidual if masked else dy.to(ctx.added) if wanted else None
        learned = (None, None) if weight is None else (dweight.sum(0), dbias.sum(0))
        return None, dx, dresidual, *learned, None, None

"""A depthwise convolution over channels-last maps and SiLU in one pass, as they stand before a scan (VMamba's SS2D).

The equation is in ``depthwise_silu_reference``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vmamba.kernels import depthwise_silu_cuda, nvrtc
from vmamba.kernels.backends import choose, eager, inlines, plain
from vmamba.kernels.operator import operator


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Filter each channel of a map with its own k x k taps, zeros around the map, and apply SiLU.

    Args:
        x: (b, h, w, d), float16, bfloat16, float32 or float64; computed in float32 (float64 for float64).
        weight: (d, 1, k, k), k odd, as ``nn.Conv2d`` has it; bias: (d,) or None.
        backend: ``cuda``, ``reference`` or None for the best that takes these tensors.

    Returns:
        y, (b, h, w, d), in x's dtype.

    Raises:
        ValueError: shapes do not fit; RuntimeError: the chosen backend cannot take these tensors.
    """
    d, k = x.shape[-1], weight.shape[-1]
    if x.ndim != 4 or weight.shape != (d, 1, k, k) or k % 2 == 0 or (bias is not None and bias.shape != (d,)):
        shift = None if bias is None else tuple(bias.shape)
        got = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {shift}"
        raise ValueError(f"x, weight and bias must be (b, h, w, d), (d, 1, k, k) with an odd k, and (d,), got {got}")
    present = (x, weight) if bias is None else (x, weight, bias)
    if plain(*present):
        return choose("depthwise_silu", backend or "", *present).forward(x, weight, bias)
    if eager(*present):
        return _Direct.apply(x, weight, bias, backend or "")
    if not backend and inlines(x):
        from vmamba.kernels import depthwise_silu_inline_triton

        return depthwise_silu_inline_triton.forward(x, weight, bias)
    return torch.ops.vmamba.depthwise_silu(x, weight, bias, backend or "")


def fused(x: Tensor, weight: Tensor) -> bool:
    """Whether a kernel of its own is there for these tensors; it can be asked in code that is being compiled."""
    types = depthwise_silu_cuda.TYPES
    return x.is_cuda and x.dtype in types and depthwise_silu_cuda.wrong_size(x, weight) is None and _compiles()


@torch.compiler.assume_constant_result
def _compiles() -> bool:
    return nvrtc.why_not() is None


@operator("depthwise_silu")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return choose("depthwise_silu", backend, x, weight, bias).forward(x, weight, bias)


@operator("depthwise_silu_backward")
def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> list[Tensor]:
    grads = choose("depthwise_silu", backend, x, weight, bias).backward(dy, x, weight, bias)
    return [g for g in grads if g is not None]


@_forward.register_fake
def _(x, weight, bias, backend):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(dy, x, weight, bias, backend):
    return [t.new_empty(t.shape) for t in (x, weight, bias) if t is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    dx, dweight, *dbias = _backward(dy, *ctx.saved_tensors, ctx.backend)
    return dx, dweight, dbias[0] if dbias else None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher, where nothing but autograd watches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.backend = backend
        return choose("depthwise_silu", backend, x, weight, bias).forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        return *choose("depthwise_silu", ctx.backend, *tensors).backward(dy, *tensors), None

"""What a block's branch adds to a residual stream, and the norm of the stream that the next branch begins with:

stream = x + factor[sample] branch,  y = (stream - mean) / sqrt(var + eps) weight + bias

The factors are those of stochastic depth. It is a layer norm alone where there is no branch.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vmamba.kernels.backends import choose, eager
from vmamba.kernels.operator import operator


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to a stream, normalise the stream; differentiable once.

    Args:
        x: (b, ..., c), the stream before. branch: the same shape, or None. factor: (b,) for the branch, or None for 1.
        weight, bias: (c,), of the norm. eps: added to the variance. dtype: of the normalised stream.
        backend: ``cuda``, ``reference`` or None for the best that takes these tensors.

    Returns:
        y in ``dtype`` and the stream in x's, (b, ..., c); x itself where there is no branch.

    Raises:
        ValueError: shapes do not fit; RuntimeError: the chosen backend cannot take these tensors.
    """
    shape, channels = x.shape, x.shape[-1:]
    fit = (branch is None or branch.shape == shape) and (factor is None or factor.shape == shape[:1])
    if not fit or weight.shape != channels or bias.shape != channels:
        got = [None if t is None else tuple(t.shape) for t in (x, branch, factor, weight, bias)]
        raise ValueError(f"x, branch, factor, weight, bias must be (b, ..., c), the same, (b,), (c,), (c,), got {got}")
    tensors = (x, weight, bias) if branch is None else (x, weight, bias, branch)
    return computed((x, branch, factor, weight, bias, eps, dtype), backend or "", direct=eager(*tensors))


def computed(arguments: tuple, backend: str, *, direct: bool) -> tuple[Tensor, Tensor]:
    """:func:`residual_norm` without its checks, for callers that have made them.

    Args:
        arguments: x, branch, factor, weight, bias, eps, dtype.
        backend: as there, an empty string for None. direct: whether the tensors are ``eager``.
    """
    x, branch, _, weight, bias, *_ = arguments
    if not direct:
        flat = (None if t is None else t.flatten(1, -2) for t in (x, branch))  # of four axes a compiler would move one
        y, stream = _Traced.apply(*flat, *arguments[2:], backend)
        return y.view(x.shape), x if branch is None else stream.view(x.shape)
    tensors = (x, weight, bias) if branch is None else (x, weight, bias, branch)
    module = choose("residual_norm", backend, *tensors)
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        y, stream = _Direct.apply(*arguments, module)
        return y, x if branch is None else stream
    return module.forward(*arguments)


def _module(backend: str, *tensors: Tensor | None) -> ModuleType:
    return choose("residual_norm", backend, *(t for t in tensors if t is not None))


@operator("residual_norm")
def _forward(
    x: Tensor, branch: Tensor | None, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    module = _module(backend, x, weight, bias, branch)
    y, stream = module.forward(x, branch, factor, weight, bias, eps, dtype)
    return y, x.new_empty(0) if branch is None else stream


def _apart(stream: Tensor, factor: Tensor | None, added: torch.dtype | None) -> bool:
    """Whether the branch's gradient is another than that of x."""
    return added is not None and (factor is not None or added != stream.dtype)


@operator("residual_norm_backward")
def _backward(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, factor: Tensor | None, weight: Tensor, eps: float,
    added: torch.dtype | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    module = _module(backend, stream, weight)
    dx, dbranch, sums = module.backward(dy, dstream, stream, factor, weight, eps, added)
    return dx, dbranch if _apart(stream, factor, added) else dx.new_empty(0), sums.to(weight.dtype)


@_forward.register_fake
def _(x, branch, factor, weight, bias, eps, dtype, backend):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(0 if branch is None else x.shape)


@_backward.register_fake
def _(dy, dstream, stream, factor, weight, eps, added, backend):
    dbranch = stream.new_empty(stream.shape, dtype=added) if _apart(stream, factor, added) else stream.new_empty(0)
    return stream.new_empty(stream.shape), dbranch, weight.new_empty(2, *weight.shape)


class _Traced(torch.autograd.Function):
    """The operators with their gradients; in compiled code they are then called without a way through autograd."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, branch, factor, weight, _, ctx.eps, _, ctx.backend = inputs
        y, stream = _forward(*inputs)
        ctx.added, ctx.kept = None if branch is None else branch.dtype, factor is not None
        saved = x if branch is None else stream, weight
        ctx.save_for_backward(*saved, *([] if factor is None else [factor]))
        return y, stream

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstream: Tensor) -> tuple[Tensor | None, ...]:
        stream, weight, *factors = ctx.saved_tensors
        factor = factors[0] if ctx.kept else None
        deep = None if ctx.added is None else dstream
        dx, dbranch, sums = _backward(dy, deep, stream, factor, weight, ctx.eps, ctx.added, ctx.backend)
        if not _apart(stream, factor, ctx.added):
            dbranch = None if ctx.added is None else dx
        dweight, dbias = sums.unbind()
        return dx, dbranch, None, dweight, dbias, None, None, None


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher, where nothing but autograd watches."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        x, branch, factor, weight, bias, ctx.eps, dtype, ctx.module = inputs
        y, stream = ctx.module.forward(x, branch, factor, weight, bias, ctx.eps, dtype)
        ctx.added, ctx.bias = None if branch is None else branch.dtype, bias.dtype
        ctx.save_for_backward(stream, factor, weight)
        ctx.set_materialize_grads(False)
        return y, None if branch is None else stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, factor, weight = ctx.saved_tensors
        dy = torch.zeros_like(stream) if dy is None else dy
        dx, dbranch, sums = ctx.module.backward(dy, dstream, stream, factor, weight, ctx.eps, ctx.added)
        dweight, dbias = sums.to(weight.dtype).unbind()
        return dx, None if ctx.added is None else dbranch, None, dweight, dbias.to(ctx.bias), None, None, None

"""Causal depthwise convolution, the short filter before Mamba's scan (arXiv:2312.00752), and its one-step form.

Both compute what the two functions of the package ``causal_conv1d`` compute, for any width; for the equation see
``causal_conv1d_reference``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.kernels.backends import choose
from vmamba.kernels.causal_conv1d_reference import reference
from vmamba.kernels.operator import operator

ACTIVATIONS = {None: False, "silu": True, "swish": True}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Filter each of d channels along l steps with its own w weights, the last of which meets the current step.

    Args:
        x: (b, d, l), float16, bfloat16, float32 or float64, any strides; computed in float32 (float64 for float64).
        weight: (d, w), any w >= 1; bias: (d,).
        initial_states: (b, d, w - 1), the inputs before the first; zeros if absent.
        return_final_states: also return the last w - 1 inputs, (b, d, w - 1), for the next call's ``initial_states``.
        activation: None, ``silu`` or ``swish`` (the same).
        backend: ``triton``, ``cpu``, ``reference`` or None for the best that takes these tensors.

    Returns:
        y, (b, d, l), with x's dtype and memory layout; with ``return_final_states`` the pair (y, final states).

    Raises:
        ValueError: shapes or names do not fit; RuntimeError: the chosen backend cannot take these tensors.
    """
    silu = _silu(activation)
    _check(x, weight, bias)
    before = weight.shape[1] - 1
    if initial_states is not None and initial_states.shape != (*x.shape[:2], before):
        raise ValueError(f"initial_states must be {(*x.shape[:2], before)}, got {tuple(initial_states.shape)}")
    y = torch.ops.vmamba.causal_conv1d(x, weight, bias, initial_states, silu, backend or "")
    if not return_final_states:
        return y
    inputs = F.pad(x, (before, 0)) if initial_states is None else torch.cat([initial_states.to(x.dtype), x], 2)
    return y, inputs[..., inputs.shape[2] - before :]


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """The convolution of a few new steps, after those in ``conv_state``, which takes them up in place.

    Args:
        x: (b, d) for one step, or (b, d, l).
        conv_state: (b, d, s) with s >= w - 1: the latest inputs, the newest last; or, with ``cache_seqlens``, a ring.
        weight, bias, activation: as in :func:`causal_conv1d`.
        cache_seqlens: (b,) integers, how many steps came before: step i of a sequence lies at i % s in the ring.

    Returns:
        y in x's shape and dtype. No gradients are meant to flow through the state.

    Raises:
        ValueError: shapes or names do not fit.
    """
    silu = _silu(activation)
    single = x.ndim == 2
    x = x[..., None] if single else x
    _check(x, weight, bias)
    size, before, length = conv_state.shape[-1], weight.shape[1] - 1, x.shape[2]
    if conv_state.shape[:-1] != x.shape[:2] or size < before:
        raise ValueError(f"conv_state must be {(*x.shape[:2], f'>= {before}')}, got {tuple(conv_state.shape)}")
    if cache_seqlens is None:
        inputs = torch.cat([conv_state.to(x.dtype), x], 2)
        conv_state.copy_(inputs[..., length:])
        past = inputs[..., size - before : size]
    else:
        steps = cache_seqlens[:, None] + torch.arange(-before, length, device=x.device)  # (b, w - 1 + l)
        slots = (steps % size)[:, None].expand(-1, x.shape[1], -1)
        past = conv_state.gather(2, slots[..., :before])
        # Of steps that share a slot only the last may be written, so that the result does not depend on the order
        conv_state.scatter_(2, slots[..., before:][..., -size:], x[..., -size:].to(conv_state.dtype))
    y = reference(x, weight, bias, past, silu)
    return y[..., 0] if single else y


@operator("causal_conv1d")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, silu: bool, backend: str
) -> Tensor:
    tensors = (x, weight, bias, initial)
    return _like(x, choose("causal_conv1d", backend, *tensors).forward(*tensors, silu))


@operator("causal_conv1d_backward")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, silu: bool, backend: str
) -> list[Tensor]:
    tensors = (x, weight, bias, initial)
    grads = choose("causal_conv1d", backend, *tensors).backward(dy, *tensors, silu)
    return [_like(t, g) for t, g in zip(tensors, grads, strict=True) if t is not None]


def _like(t: Tensor, value: Tensor) -> Tensor:
    """``value`` in the dtype and memory layout that the fake implementations promise, and in memory of its own."""
    target = torch.empty_like(t)
    alone = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    fits = value.stride() == target.stride() and value.dtype == t.dtype
    return value if alone and fits else target.copy_(value)


@_forward.register_fake
def _(x, weight, bias, initial, silu, backend):
    return torch.empty_like(x)


@_backward.register_fake
def _(dy, x, weight, bias, initial, silu, backend):
    return [torch.empty_like(t) for t in (x, weight, bias, initial) if t is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu, ctx.backend = inputs
    ctx.present = [t is not None for t in tensors]
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    grads = iter(torch.ops.vmamba.causal_conv1d_backward(dy, *ctx.saved_tensors, ctx.silu, ctx.backend))
    return *(next(grads) if there else None for there in ctx.present), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _silu(activation: str | None) -> bool:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose from None, 'silu', 'swish'")
    return ACTIVATIONS[activation]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (b, d, l), got {tuple(x.shape)}")
    d = x.shape[1]
    if weight.ndim != 2 or weight.shape[0] != d or weight.shape[1] < 1:
        raise ValueError(f"weight must be ({d}, w) with w >= 1 for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (d,):
        raise ValueError(f"bias must be ({d},) for x {tuple(x.shape)}, got {tuple(bias.shape)}")

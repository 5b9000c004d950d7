"""Selective scan (Mamba, arXiv:2312.00752): a recurrence whose step size, input and output maps depend on the input.

Two forms of one operator: :func:`selective_scan` with mamba-ssm's arguments, (b, d, l), and :func:`route_scan` for
channels-last routes, (b, k, l, d), which is what 2D scans produce. Equation: see ``selective_scan_reference``.
"""

import math

import torch
from torch import Tensor

from vmamba.kernels.backends import choose, plain
from vmamba.kernels.checks import check_shapes
from vmamba.kernels.operator import operator
from vmamba.kernels.selective_scan_reference import CHUNK


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan d channels along l steps with n states each; the meaning of ``mamba_ssm``'s ``selective_scan_fn``.

    Args:
        u: (b, d, l), float16, bfloat16, float32 or float64.
        delta: (b, d, l), or (b, d', l) with d' dividing d: channel c uses row c // (d / d').
        A: (d, n), real.
        B, C: (d, n) constant, (b, n, l), or (b, g, n, l) with g dividing d: channel c uses group c // (d / g).
        D, delta_bias: (d,); ``delta_bias`` may be (d',).
        z: (b, d, l): the result is multiplied by silu(z).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step, (b, d, n), which carries no gradient.
        backend: ``cuda``, ``triton``, ``cpu``, ``reference`` or None for the best that takes these tensors.

    Returns:
        y, (b, d, l) in u's dtype; with ``return_last_state`` the pair (y, last state).

    Raises:
        ValueError: shapes or types do not fit; RuntimeError: the chosen backend cannot take these tensors.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    b, d, length = u.shape
    n = A.shape[1]
    k = math.lcm(_groups(B), _groups(C))

    def rows(t: Tensor | None) -> Tensor | None:  # (b, d, l) -> (b, k, l, d / k)
        return None if t is None else t.unflatten(1, (k, -1)).transpose(2, 3)

    def states(t: Tensor) -> Tensor:  # -> (b, k, l, n)
        if t.ndim == 2:
            return t[None, :, None].expand(b, -1, length, -1)
        t = t if t.ndim == 4 else t[:, None]
        return t.repeat_interleave(k // t.shape[1], 1).transpose(2, 3)

    def channels(t: Tensor | None) -> Tensor | None:  # (d', ...) -> (k, d / k, ...)
        return None if t is None else t.repeat_interleave(d // t.shape[0], 0).unflatten(0, (k, -1))

    delta = delta.repeat_interleave(d // delta.shape[1], 1)
    args = rows(u), rows(delta), channels(A), states(B), states(C), channels(D), rows(z), channels(delta_bias)
    y, last, _ = torch.ops.vmamba.selective_scan(*args, delta_softplus, backend or "")
    y = y.transpose(2, 3).reshape(b, d, length).to(u.dtype)
    return (y, last.reshape(b, d, n).detach()) if return_last_state else y


def route_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scan k routes of l steps and d channels, each route with its own A, B, C.

    Args:
        u, delta: (b, k, l, d); A: (k, d, n); B, C: (b, k, l, n); D, delta_bias: (k, d).
        delta_softplus, backend: as in :func:`selective_scan`.
        out_dtype: of y, u's or float32; the latter by default, so that sums over routes lose nothing.

    Returns:
        y, (b, k, l, d), in ``out_dtype`` or float32 (float64 for float64 inputs).
    """
    tensors = (u, delta, A, B, C, D, None, delta_bias)
    dtype = out_dtype or torch.promote_types(u.dtype, torch.float32)
    if plain(*(t for t in tensors if t is not None)):
        module = choose("selective_scan", backend or "", *tensors)
        if hasattr(module, "values"):  # without the states that a backward would need
            return module.values(delta_softplus, dtype, *tensors)
        return module.forward(*tensors, delta_softplus)[0].to(dtype)
    return torch.ops.vmamba.selective_scan(*tensors, delta_softplus, backend or "")[0].to(dtype)


@operator("selective_scan")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (u, delta, A, B, C, D, z, bias)
    return choose("selective_scan", backend, *tensors).forward(*tensors, softplus)


@operator("selective_scan_backward")
def _backward(
    dy: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    backend: str,
) -> list[Tensor]:
    tensors = (u, delta, A, B, C, D, z, bias)
    grads = choose("selective_scan", backend, *tensors).backward(dy, states, softplus, *tensors)
    return [g for g in grads if g is not None]


@_forward.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus, backend):
    b, k, length, d = u.shape
    n = A.shape[-1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    chunks = (length + CHUNK - 1) // CHUNK
    return (
        u.new_empty(b, k, length, d, dtype=dtype),
        u.new_empty(b, k, d, n, dtype=dtype),
        u.new_empty(b, k, chunks, d, n, dtype=dtype),
    )


@_backward.register_fake
def _(dy, states, u, delta, A, B, C, D, z, bias, softplus, backend):
    return [t.new_empty(t.shape) for t in (u, delta, A, B, C, D, z, bias) if t is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.backend = inputs
    ctx.present = [t is not None for t in tensors]
    ctx.save_for_backward(output[2], *tensors)


def _gradients(ctx, dy, dlast, dstates):
    states, *tensors = ctx.saved_tensors
    grads = iter(torch.ops.vmamba.selective_scan_backward(dy, states, *tensors, ctx.softplus, ctx.backend))
    return *(next(grads) if there else None for there in ctx.present), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _groups(t: Tensor) -> int:
    """Groups of channels with their own B or C: every channel for a constant (d, n), one for (b, n, l)."""
    return {2: t.shape[0], 3: 1, 4: t.shape[1]}[t.ndim]


def _check(u, delta, A, B, C, D, z, delta_bias) -> None:
    if A.is_complex():
        raise ValueError(f"A must be real, got {A.dtype}; a complex A of n states is not supported")
    b, d, length = u.shape
    n = A.shape[-1]
    divisors = [r for r in range(1, d + 1) if d % r == 0]
    maps = (d, n), (b, n, length), *((b, g, n, length) for g in divisors)
    wanted = {
        "delta": (delta, *((b, r, length) for r in divisors)),
        "A": (A, (d, n)),
        "B": (B, *maps),
        "C": (C, *maps),
        "D": (D, (d,)),
        "z": (z, (b, d, length)),
        "delta_bias": (delta_bias, *((r,) for r in divisors)),
    }
    check_shapes(wanted, "u (b, d, l)", u)

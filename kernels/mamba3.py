"""Mamba-3's recurrence (arXiv:2603.15569): trapezoidal steps, a rotating state, one or several inputs per step.

Equation: see ``mamba3_reference``. What step t adds enters the state at t and again at t + 1, so for every later step
its weight is the sum of both, and the recurrence is state-space duality with another weight on the step itself. Any
length, number of states, head size, rank and strides; deterministic; computed in float32, whatever autocast says.

Letters: b batch, g heads (of all routes), l steps, r inputs and outputs of a step (the rank of MIMO; 1 for SISO), n
states, p channels of a head, a angles.
"""

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.kernels.checks import check_shapes
from vmamba.kernels.chunks import CHUNK, exact, outer_scan, prefix_sums
from vmamba.kernels.mamba3_reference import State, nothing, rotate


def mamba3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    trap: Tensor,
    angles: Tensor,
    *,
    state: State | None = None,
    return_state: bool = False,
    chunk: int = CHUNK,
) -> Tensor | tuple[Tensor, State]:
    """Scan g heads along l steps.

    Args:
        q, k: (b, g, l, r, n), output and input maps (C and B), before they are turned; float16 to float64.
        v: (b, g, l, r, p).
        log_decay: (b, g, l), A dt, negative. dt: (b, g, l), positive step sizes.
        trap: (b, g, l), logit of the share of the step's own end in the trapezoid.
        angles: (b, g, l, a) with 2a <= n: the first 2a states turn in pairs of neighbours, by pi tanh(angles) dt.
        state: what came before the first step; nothing if absent.
        return_state: also return the state after the last step, for the next call's ``state``.
        chunk: steps times r per chunk; the result does not depend on it.

    Returns:
        y (b, g, l, r, p) in float32 (float64 for float64 inputs); with ``return_state`` the pair (y, state).

    Raises:
        ValueError: shapes do not fit.
    """
    _check(q, k, v, log_decay, dt, trap, angles, chunk)
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v, log_decay, dt, trap, angles = (t.to(wide) for t in (q, k, v, log_decay, dt, trap, angles))
    before = nothing(k, v, angles) if state is None else State(*(t.to(wide) for t in state))
    with exact(v.device):
        turns = math.pi * prefix_sums((angles.tanh() * dt[..., None]).mT).mT
        angle = ((before.angle[:, :, None] + turns) % (2 * math.pi)).to(wide)
        q, k = (rotate(t, angle[:, :, :, None]) for t in (q, k))
        own = trap.sigmoid() * dt  # weight of a step at the step itself
        again = (1 - trap.sigmoid()) * dt  # weight of the step before it
        weight = own + F.pad(again[..., 1:], (0, 1))
        initial = before.ssm + again[..., :1, None] * (before.v.mT @ before.k)
        inputs = (v * weight[..., None, None])[:, :, :, None]
        y, ssm = outer_scan(
            inputs, log_decay[..., None], k, q, initial=initial[:, :, None], past_only=True, chunk=chunk
        )
        y = y[:, :, :, 0] + (q @ k.mT) @ (v * own[..., None, None])
    return (y, State(angle[:, :, -1], ssm[:, :, 0], k[:, :, -1], v[:, :, -1])) if return_state else y


def mamba3_siso(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None = None,
    Z: Tensor | None = None,
    *,
    return_state: bool = False,
    chunk: int = CHUNK,
) -> Tensor | tuple[Tensor, State]:
    """One input and output per step, with the arguments of the published SISO operator.

    Args:
        Q, K: (b, l, g, n), head i of h uses group i // (h / g). Q_bias, K_bias: (h, n), added for each head.
        V: (b, l, h, p). ADT, DT, Trap: (b, h, l). Angles: (b, l, h, a).
        D: (h,), skips V. Z: (b, l, h, p): the result is multiplied by silu(Z).
        return_state: also return the :class:`State` after the last step, with r = 1.
        chunk: steps per chunk.

    Returns:
        y (b, l, h, p) in V's dtype; with ``return_state`` the pair (y, state).

    Raises:
        ValueError: shapes do not fit.
    """
    heads = V.shape[2]
    if heads % K.shape[2]:
        raise ValueError(f"{heads} heads of V {tuple(V.shape)} do not divide into the {K.shape[2]} groups of K")
    q, k = (
        (t.repeat_interleave(heads // t.shape[2], 2) + bias).transpose(1, 2)[..., None, :]
        for t, bias in ((Q, Q_bias), (K, K_bias))
    )
    v, angles = V.transpose(1, 2)[..., None, :], Angles.transpose(1, 2)
    result = mamba3(q, k, v, ADT, DT, Trap, angles, return_state=True, chunk=chunk)
    y, state = cast(tuple[Tensor, State], result)
    y = y[..., 0, :].transpose(1, 2)  # (b, l, h, p)
    y = y if D is None else y + V * D[:, None]
    y = (y if Z is None else y * F.silu(Z.to(y.dtype))).to(V.dtype)
    return (y, state) if return_state else y


def _check(q, k, v, log_decay, dt, trap, angles, chunk) -> None:
    if v.ndim != 5 or not v.shape[2]:
        raise ValueError(f"v must be (b, g, l, r, p) with l > 0, got {tuple(v.shape)}")
    b, g, length, r, _ = v.shape
    n, pairs = k.shape[-1], angles.shape[-1]
    wanted = {
        "q": (q, (b, g, length, r, n)),
        "k": (k, (b, g, length, r, n)),
        "log_decay": (log_decay, (b, g, length)),
        "dt": (dt, (b, g, length)),
        "trap": (trap, (b, g, length)),
        "angles": (angles, (b, g, length, min(pairs, n // 2))),
    }
    check_shapes(wanted, "v (b, g, l, r, p)", v)
    if chunk < 1:
        raise ValueError(f"a chunk must have at least one step, got {chunk}")

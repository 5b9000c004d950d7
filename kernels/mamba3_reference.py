"""The meaning of Mamba-3's recurrence, in PyTorch, in any precision: what the chunked form is tested against.

Mamba-3 (arXiv:2603.15569): the trapezoidal rule, a state that rotates, and r inputs and outputs at each step::

    angle[t] = angle[t-1] + pi tanh(angles[t]) dt[t]  mod 2 pi       k[t], q[t] turn by angle[t]
    a = exp(log_decay[t]),  w = sigmoid(trap[t])
    S[t] = a S[t-1] + (1 - w) dt[t] a sum_r v[t-1, r] k[t-1, r]^T + w dt[t] sum_r v[t, r] k[t, r]^T
    y[t, r] = S[t] q[t, r]
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """What the next step needs: angle (b, g, a) from 0 to 2 pi, ssm (b, g, p, n), the last turned k (b, g, r, n) and
    the last v (b, g, r, p)."""

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the first 2a channels of x (..., n), pairs of neighbours, by ``angle`` (..., a)."""
    pairs = angle.shape[-1]
    even, odd = x[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([turned, x[..., 2 * pairs :]], -1)


def nothing(k: Tensor, v: Tensor, angles: Tensor) -> State:
    """The state before a sequence, zeros, in v's dtype."""
    (b, g, _, r, n), p = k.shape, v.shape[-1]
    return State(*(v.new_zeros(b, g, *shape) for shape in ((angles.shape[-1],), (p, n), (r, n), (r, p))))


def reference(q, k, v, log_decay, dt, trap, angles, *, state=None):
    """The arguments of :func:`vmamba.kernels.mamba3.mamba3` -> y (b, g, l, r, p), state after the last step."""
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v, log_decay, dt, trap, angles = (t.to(wide) for t in (q, k, v, log_decay, dt, trap, angles))
    angle, S, k_before, v_before = nothing(k, v, angles) if state is None else (t.to(wide) for t in state)
    ys = []
    for t in range(v.shape[2]):
        step, w, a = (x[:, :, t, None, None] for x in (dt, trap.sigmoid(), log_decay.exp()))
        angle = (angle + math.pi * angles[:, :, t].tanh() * step[..., 0]) % (2 * math.pi)
        k_now, q_now = (rotate(x[:, :, t], angle[:, :, None]) for x in (k, q))  # (b, g, r, n)
        v_now = v[:, :, t]
        S = a * S + (1 - w) * step * a * (v_before.mT @ k_before) + w * step * (v_now.mT @ k_now)
        ys.append(q_now @ S.mT)  # (b, g, r, p)
        k_before, v_before = k_now, v_now
    return torch.stack(ys, 2), State(angle, S, k_before, v_before)

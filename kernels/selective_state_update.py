"""One step of the selective scan (Mamba, arXiv:2312.00752) or of state-space duality, for generating step by step."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.kernels.checks import check_shapes


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """state <- exp(dt A) state + dt B x; y = (C state + D x) silu(z); the meaning of mamba-ssm's function of that name.

    The shapes without and with h heads, g groups of which share B and C (head i uses group i // (h / g)):

    Args:
        state: (b, d, n) or (b, h, d, n); overwritten. It and the types of the others decide the precision, float32 at
            least.
        x, dt, z: (b, d) or (b, h, d).
        A: (d, n) or (h, d, n).
        B, C: (b, n) or (b, g, n).
        D, dt_bias: (d,) or (h, d).
        dt_softplus: apply softplus to dt + dt_bias.

    Returns:
        y in x's shape and dtype. No gradients are meant to flow through the state.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias)
    wide = torch.promote_types(torch.promote_types(state.dtype, x.dtype), torch.float32)
    u, dt, A, B, C = (t.to(wide) for t in (x, dt, A, B, C))
    dt = dt if dt_bias is None else dt + dt_bias.to(wide)
    dt = F.softplus(dt) if dt_softplus else dt
    if x.ndim == 3:
        B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))  # (b, h, n)
    after = torch.exp(dt[..., None] * A) * state.to(wide) + (dt * u)[..., None] * B[..., None, :]
    state.copy_(after)
    y = (after * C[..., None, :]).sum(-1)
    y = y if D is None else y + u * D.to(wide)
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)


def _check(state, x, dt, A, B, C, D, z, dt_bias) -> None:
    if state.ndim not in (3, 4):
        raise ValueError(f"state must be (b, d, n) or (b, h, d, n), got {tuple(state.shape)}")
    (b, *inner), n = state.shape[:-1], state.shape[-1]
    groups = B.shape[1:-1]
    wanted = {
        "x": (x, (b, *inner)),
        "dt": (dt, (b, *inner)),
        "A": (A, (*inner, n)),
        "B": (B, (b, *groups, n)),
        "C": (C, (b, *groups, n)),
        "D": (D, tuple(inner)),
        "z": (z, (b, *inner)),
        "dt_bias": (dt_bias, tuple(inner)),
    }
    check_shapes(wanted, "state", state)
    if len(groups) != len(inner) - 1 or (groups and inner[0] % groups[0]):
        shapes = "(b, n)" if len(inner) == 1 else f"(b, g, n) with g dividing {inner[0]} heads"
        raise ValueError(f"B and C must be {shapes} for state {tuple(state.shape)}, got {tuple(B.shape)}")

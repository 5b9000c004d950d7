"""Quasiseparable matrix products (Hydra, arXiv:2407.09941, section 3): every token sees both sides in linear time.

    y = M x,   M[t, s] = c[t-1]^T a[t-1] ... a[s+1] b[s]     below the diagonal, s < t (forward scan)
                         c'[t+1]^T a'[t+1] ... a'[s-1] b'[s]  above it, s > t (backward scan)
                         diagonal[t]                          on it

with a = exp(dt A), b = dt B. Both triangles are state-space duality (``ssd``) read one step late, so that a token's own
contribution is left to the free diagonal. Letters: b batch, g groups that share B and C, l steps, m heads of a group,
p channels of a head, n states; an axis of two holds (forward, backward), both in the order of the sequence.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.kernels.checks import check_shapes
from vmamba.kernels.ssd import ssd


def matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, diagonal: Tensor) -> Tensor:
    """M itself, (b, g, m, l, l), in the arguments' precision; arguments as in :func:`quasiseparable`."""
    length = dt.shape[3]
    triangles = []
    for side in range(2):
        step, b, c = (t[:, side].flip(2) if side else t[:, side] for t in (dt, B, C))
        decay = (step * A[:, None]).cumsum(2).mT  # (b, g, m, l)
        upper = torch.ones(length, length, dtype=torch.bool, device=dt.device).triu(1)
        product = (decay[..., :, None] - decay[..., None, :]).masked_fill(upper, -torch.inf).exp()
        scan = product * (c @ b.mT)[:, :, None] * step.mT[..., None, :]
        late = F.pad(scan[..., :-1, :], (0, 0, 1, 0))
        triangles.append(late.flip(-1, -2) if side else late)
    return triangles[0] + triangles[1] + torch.diag_embed(diagonal.mT)


def quasiseparable(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, diagonal: Tensor, *, initial: Tensor | None = None
) -> Tensor:
    """M x by two scans, in time and memory linear in l.

    Args:
        x: (b, g, l, m, p), float16, bfloat16, float32 or float64.
        dt: (b, 2, g, l, m), positive step sizes (bias, softplus and limits already applied).
        A: (g, m), negative decay rates, the same in both directions.
        B, C: (b, 2, g, l, n).
        diagonal: (b, g, l, m).
        initial: (g, m, p, n), the state before the first step of either direction; zero if absent.

    Returns:
        y (b, g, l, m, p) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit.
    """
    _check(x, dt, A, B, C, diagonal, initial)
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups = x.shape[1]
    inputs = _facing(x[:, None].expand(-1, 2, *x.shape[1:]))
    dt, B, C = (_facing(t) for t in (dt, B, C))
    before = None if initial is None else torch.cat([initial, initial]).expand(x.shape[0], *[-1] * 4)
    y = ssd(inputs, dt, torch.cat([A, A]), B, C, initial=before)
    y = F.pad(y[:, :, :-1], (0, 0, 0, 0, 1, 0))  # each token takes what the step before it gives
    return y[:, :groups] + y[:, groups:].flip(2) + x.to(dtype) * diagonal.to(dtype)[..., None]


def _facing(t: Tensor) -> Tensor:
    """(b, 2, g, l, ...) -> (b, 2g, l, ...): the backward half in the order of its scan."""
    return torch.cat([t[:, 0], t[:, 1].flip(2)], 1)


def _check(x, dt, A, B, C, diagonal, initial) -> None:
    (b, g, length, m, p), n = x.shape, B.shape[-1]
    wanted = {
        "dt": (dt, (b, 2, g, length, m)),
        "A": (A, (g, m)),
        "B": (B, (b, 2, g, length, n)),
        "C": (C, (b, 2, g, length, n)),
        "diagonal": (diagonal, (b, g, length, m)),
        "initial": (initial, (g, m, p, n)),
    }
    check_shapes(wanted, "x (b, g, l, m, p)", x)

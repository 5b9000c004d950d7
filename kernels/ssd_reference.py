"""The meaning of state-space duality, in PyTorch, in any precision: what every fast version is tested against.

Mamba-2 (arXiv:2405.21060), equations 1 and 2 with one scalar A for each head::

    dt[t] = clamp(softplus(dt[t] + bias))
    S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]^T          S[-1] = initial, or 0
    y[t] = S[t] C[t] + D x[t]
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    """clamp(softplus(dt + bias)): dt (b, k, l, m), bias (k, m), in dt's dtype; what is not asked for is left out."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)[:, None]
    dt = F.softplus(dt) if softplus else dt
    return dt if limit == (0.0, torch.inf) else dt.clamp(*limit)


def reference(x, dt, A, B, C, D=None, *, dt_bias=None, dt_softplus=False, dt_limit=(0.0, torch.inf), initial=None):
    """The arguments of :func:`vmamba.kernels.ssd.ssd` -> y (b, k, l, m, p), state after the last step."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (t.to(wide) for t in (x, dt, A, B, C))
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit)
    state = x.new_zeros(*x.shape[:2], *x.shape[3:], B.shape[-1]) if initial is None else initial.to(wide)
    ys = []
    for t in range(x.shape[2]):
        step = dt[:, :, t, :, None, None]  # (b, k, m, 1, 1)
        state = torch.exp(step * A[..., None, None]) * state + step * x[:, :, t, ..., None] * B[:, :, t, None, None]
        ys.append((state * C[:, :, t, None, None]).sum(-1))
    y = torch.stack(ys, 2)
    return y if D is None else y + x * D.to(wide).reshape(*A.shape, -1)[:, None], state

"""State-space duality (Mamba-2, arXiv:2405.21060): one decay per head, evaluated chunk by chunk as matrix products.

    S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]^T          y[t] = S[t] C[t] + D x[t]

Letters: b batch, k routes (groups that share B and C), l steps, m heads, p channels of a head, n states.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """The recurrence step by step; arguments and result as in :func:`ssd`, in any precision."""
    state = x.new_zeros(*x.shape[:2], *x.shape[3:], B.shape[-1])  # (b, k, m, p, n)
    ys = []
    for t in range(x.shape[2]):
        step = dt[:, :, t, :, None, None]
        state = torch.exp(step * A[..., None, None]) * state + step * x[:, :, t, ..., None] * B[:, :, t, None, None]
        ys.append((state * C[:, :, t, None, None]).sum(-1))
    y = torch.stack(ys, 2)
    return y if D is None else y + x * D[:, None]


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, chunk: int = 64) -> Tensor:
    """Scan k routes of l steps with m heads of p channels and n states.

    Args:
        x: (b, k, l, m, p), float16, bfloat16, float32 or float64.
        dt: (b, k, l, m), positive step sizes (bias and softplus already applied).
        A: (k, m), negative decay rates.
        B, C: (b, k, l, n).
        D: (k, m, p) or None.
        chunk: steps per chunk; any length l works.

    Returns:
        y (b, k, l, m, p) in float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    length = x.shape[2]
    chunk = min(chunk, length)
    pad = -length % chunk

    def chunked(t: Tensor) -> Tensor:  # (b, k, l, ...) -> (b, k, chunks, steps, ...); padded steps have dt = 0
        return F.pad(t, (0, 0) * (t.ndim - 3) + (0, pad)).unflatten(2, (-1, chunk))

    inputs, b, c = chunked(x * dt[..., None]), chunked(B), chunked(C)
    decay = chunked(dt * A[:, None]).cumsum(3).movedim(-1, 3)  # (b, k, chunks, m, steps), inclusive sums of log decay
    within = (decay[..., :, None] - decay[..., None, :]).masked_fill(_upper(chunk, x.device), -torch.inf).exp()
    y = torch.einsum("bkcij,bkcmij,bkcjmp->bkcimp", c @ b.mT, within, inputs)
    to_end = (decay[..., -1:] - decay).exp()
    states = torch.einsum("bkcmj,bkcjmp,bkcjn->bkcmpn", to_end, inputs, b)
    before = _carry(states, decay[..., -1])
    y = y + torch.einsum("bkcin,bkcmpn,bkcmi->bkcimp", c, before, decay.exp())
    y = y.flatten(2, 3)[:, :, :length]
    return y if D is None else y + x * D.to(dtype)[:, None]


def _upper(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def _carry(states: Tensor, decay: Tensor) -> Tensor:
    """States before each chunk, (b, k, chunks, m, p, n), from what chunks add and their log decay (b, k, chunks, m)."""
    chunks = states.shape[2]
    total = F.pad(decay, (0, 0, 1, 0)).cumsum(2)[:, :, :-1]  # log decay from the start to before each chunk
    after = decay.cumsum(2)
    weights = (total.movedim(-1, 2)[..., :, None] - after.movedim(-1, 2)[..., None, :]).masked_fill(
        _upper(chunks, states.device) | torch.eye(chunks, dtype=torch.bool, device=states.device), -torch.inf
    )
    return torch.einsum("bkmij,bkjmpn->bkimpn", weights.exp(), states)

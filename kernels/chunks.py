"""What the chunked operators share: exact sums of logarithms, and the scan over decaying outer products.

A recurrence of l steps becomes matrix products over chunks of ``CHUNK`` steps and a recurrence of l / CHUNK steps,
which is evaluated in the same way (state-space duality, Mamba-2, arXiv:2405.21060, section 6). Decays multiply, so
their logarithms add up. They are summed in float64, by products with triangular matrices: differences of long sums stay
exact, and the sums are deterministic on every device (``torch.cumsum`` is not on CUDA).
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.kernels.backends import eager

CHUNK = 64
SUMS = {"mps": torch.float32}  # has no float64
LEAST = {t: math.ceil(math.log(torch.finfo(t).tiny)) for t in (torch.float32, torch.float64)}  # exp is not subnormal


def exact(device: torch.device) -> AbstractContextManager:
    """Autocast switched off on ``device``: products of float32 stay float32."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def split(t: Tensor, size: int, axis: int) -> Tensor:
    """(..., l, ...) -> (..., ceil(l / size), size, ...) along ``axis`` >= 0, with zeros after the end."""
    padding = -t.shape[axis] % size
    return F.pad(t, (0, 0) * (t.ndim - 1 - axis) + (0, padding)).unflatten(axis, (-1, size))


def prefix_sums(t: Tensor) -> Tensor:
    """(..., l) -> (..., l), sums from the first element up to each, in float64."""
    t = t.to(SUMS.get(t.device.type, torch.float64))
    length = t.shape[-1]
    if length <= CHUNK:
        return t @ torch.ones(length, length, dtype=t.dtype, device=t.device).triu()
    blocks = prefix_sums(split(t, CHUNK, t.ndim - 1))  # (..., blocks, CHUNK)
    before = F.pad(prefix_sums(blocks[..., -1])[..., :-1], (1, 0))
    return (blocks + before[..., None]).flatten(-2)[..., :length]


def decays(log: Tensor) -> tuple[Tensor, Tensor]:
    """What is left at step i of what was there before the first step, and of what step j added.

    Args:
        log: (..., q), logarithms of the decay at each step.

    Returns:
        exp(log[0] + ... + log[i]), (..., q), and exp(log[j + 1] + ... + log[i]), (..., q, q), zero for j > i.
    """
    sums = prefix_sums(log)
    between = _Between.apply(sums, log.dtype) if log.is_cpu and eager(log) else _between(sums, log.dtype)
    return _exp(sums.to(log.dtype)), between


def _between(sums: Tensor, dtype: torch.dtype) -> Tensor:
    q = sums.shape[-1]
    later = torch.ones(q, q, dtype=torch.bool, device=sums.device).triu(1)
    return _exp((sums[..., :, None] - sums[..., None, :]).to(dtype).masked_fill(later, -torch.inf))


def _exp(x: Tensor) -> Tensor:
    """exp(x) without subnormal numbers: where they come out, MKL's takes 40 times as long."""
    if x.device.type != "cpu":
        return x.exp()
    least = LEAST[x.dtype]
    return x.clamp(min=least).exp().masked_fill(x < least, 0)


class _Between(torch.autograd.Function):
    """:func:`_between` on a CPU, in place; nothing is kept but the result."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, dtype: torch.dtype) -> Tensor:
        y = (sums[..., :, None] - sums[..., None, :]).to(dtype)
        least = LEAST[dtype]
        y = torch.threshold_(y.clamp_(min=least).tril_().exp_().tril_(), math.exp(least) * 1.001, 0.0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dlog = (dy * ctx.saved_tensors[0]).double()  # its sums all but cancel
        return dlog.sum(-1) - dlog.sum(-2), None


def linear_scan(log: Tensor, x: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """y[t] = exp(log[t]) y[t-1] + x[t] from y = 0: log (..., t), x (..., t, f) -> y (..., t, f)."""
    steps = x.shape[-2]
    if steps <= chunk:
        return decays(log)[1] @ x
    log, x = split(log, chunk, log.ndim - 1), split(x, chunk, x.ndim - 2)
    start, between = decays(log)
    y = between @ x  # (..., blocks, chunk, f)
    ends = linear_scan(log.sum(-1), y[..., -1, :], chunk=chunk)
    before = F.pad(ends[..., :-1, :], (0, 0, 1, 0))
    y = y + start[..., None] * before[..., None, :]
    return y.flatten(-3, -2)[..., :steps, :]


def outer_scan(
    x: Tensor,
    log: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial: Tensor | None = None,
    past_only: bool = False,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Scan over outer products: g groups that share B and C, of m heads each; r products are added at each step.

        S[t] = exp(log[t]) S[t-1] + sum_r x[t, r] B[t, r]^T          y[t, r] = S[t] C[t, r]

    Args:
        x: (b, g, l, m, r, p), float32 or float64. log: (b, g, l, m), at most 0 for a decay. B, C: (b, g, l, r, n).
        initial: (b, g, m, p, n), the state before the first step; zero if absent.
        past_only: leave what step t itself adds out of y[t].
        chunk: rows (steps times r) of a chunk's matrices; any length l works.

    Returns:
        y (b, g, l, m, r, p), and the state after the last step, (b, g, m, p, n).
    """
    length, rank = x.shape[2], x.shape[4]
    q = min(max(chunk // rank, 1), length)
    B, C = (split(t, q, 2).flatten(3, 4) for t in (B, C))  # (b, g, c, q r, n)
    x = split(x, q, 2).transpose(3, 4).flatten(4, 5)  # (b, g, c, m, q r, p)
    log = split(log, q, 2).mT  # (b, g, c, m, q)
    start, between = decays(log)
    seen = between.tril(-1) if past_only else between
    products = (C @ B.mT)[:, :, :, None].unflatten(-1, (q, rank)).unflatten(-3, (q, rank))
    products = (products * seen[..., :, None, :, None]).flatten(-2).flatten(-3, -2)  # (b, g, c, m, q r, q r)
    kept = x.unflatten(-2, (q, rank)) * between[..., -1, :, None, None]  # what the chunk's end has of each step
    added = torch.einsum("bgcmip,bgcin->bgcmpn", kept.flatten(-3, -2), B)
    first = torch.zeros_like(added[:, :, 0]) if initial is None else initial.to(added.dtype)
    states = torch.cat([first[:, :, None], added], 2).flatten(-2).transpose(2, 3)  # (b, g, m, 1 + c, p n)
    total = F.pad(log.sum(-1).mT, (1, 0))  # (b, g, m, 1 + c)
    states = linear_scan(total, states).transpose(2, 3).unflatten(-1, added.shape[-2:])
    past = torch.einsum("bgcin,bgcmpn->bgcmip", C, states[:, :, :-1])
    y = (products @ x).unflatten(-2, (q, rank)) + past.unflatten(-2, (q, rank)) * start[..., None, None]
    return y.movedim(3, 4).flatten(2, 3)[:, :, :length], states[:, :, -1]

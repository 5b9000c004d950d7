"""Polyline path mask: decay along the L-shaped path between two pixels (PPMA, arXiv:2506.15940, section 3).

Equation: see ``polyline_mask_reference``. The mask L is a product of decays along rows and decays along columns: L v
mixes every column and then every row, and L^T v every row and then every column. Each of these is a first-order
recurrence in both directions (``chunks.linear_scan``), so that time and memory grow linearly with h * w. Exponentials
are taken only of sums of log decays, which are not positive: no decay is too strong and no grid too long.
"""

import torch
from torch import Tensor

from vmamba.kernels.chunks import exact, linear_scan, prefix_sums

CHUNK = 32  # steps of one matrix product; with 16 channels on a CPU core, chunks of 64 take two to three times as long


def segment_sums(a: Tensor) -> Tensor:
    """(..., n) -> (..., n, n): at [j, l] the sum of a[t] for min(j, l) < t <= max(j, l)."""
    sums, n = prefix_sums(a), a.shape[-1]
    between = (sums[..., :, None] - sums[..., None, :]).to(a.dtype)
    lower = torch.ones(n, n, dtype=torch.bool, device=a.device).tril()
    return torch.where(lower, between, -between)


def log_masks(rows: Tensor, columns: Tensor, of: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """M and its transpose for the queries of some rows of the grid, from the sums along rows and columns.

    Args:
        rows: (..., h, w, w), ``segment_sums(a)``.
        columns: (..., w, h, h), ``segment_sums(b.mT)``.
        of: the q rows whose pixels are queries.

    Returns:
        Two tensors (..., q, w, h, w): query row and column, key row and column.
    """
    first_row = rows[..., of, :, None, :] + columns.movedim(-3, -1)[..., of, None, :, :]
    first_column = columns.transpose(-3, -2)[..., of, :, :, None] + rows.transpose(-3, -2)[..., None, :, :, :]
    return first_row, first_column


def polyline_mask(v: Tensor, a: Tensor, b: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply the polyline path mask with values, in time and memory linear in h * w.

    Args:
        v: (..., h, w, d), float16, bfloat16, float32 or float64.
        a, b: (..., h, w), log decays along rows and along columns, at most 0.
        transposed: L^T v, whose paths follow the query's column first, in place of L v.

    Returns:
        (..., h, w, d) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit.
    """
    if v.ndim < 3 or a.shape != v.shape[:-1] or b.shape != v.shape[:-1]:
        raise ValueError(
            f"a and b must be (..., h, w) for v (..., h, w, d) = {tuple(v.shape)}, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    dtype = torch.promote_types(v.dtype, torch.float32)
    v, a, b = v.to(dtype), a.to(dtype), b.to(dtype)
    with exact(v.device):
        return _along_columns(_along_rows(v, a), b) if transposed else _along_rows(_along_columns(v, b), a)


def masked_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, transposed: bool = False
) -> Tensor:
    """(q k^T * L) v without the product of queries and keys: the mask is applied to the outer products of k and v.

    Args:
        q, k: (..., h, w, n), after whatever feature map the attention has.
        v, a, b, transposed: as in :func:`polyline_mask`.

    Returns:
        (..., h, w, d) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit.
    """
    if q.shape != k.shape or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"q and k must be (..., h, w, n) for v (..., h, w, d) = {tuple(v.shape)}, got {tuple(q.shape)} and "
            f"{tuple(k.shape)}"
        )
    wide = torch.promote_types(v.dtype, torch.float32)
    outer = (k.to(wide)[..., :, None] * v.to(wide)[..., None, :]).flatten(-2)
    states = polyline_mask(outer, a, b, transposed=transposed).unflatten(-1, (k.shape[-1], -1))  # (..., h, w, n, d)
    with exact(v.device):
        return (q.to(wide)[..., None, :] @ states).squeeze(-2)


def _along_rows(x: Tensor, a: Tensor) -> Tensor:
    """Each row mixed with exp(R): the recurrences from its left and from its right end, (..., h, w, d)."""
    logs = torch.stack([a, a.flip(-1).roll(1, -1)])  # from the right, a pixel is entered by the step on its right
    from_left, from_right = linear_scan(logs, torch.stack([x, x.flip(-2)]), chunk=CHUNK)
    return from_left + from_right.flip(-2) - x


def _along_columns(x: Tensor, b: Tensor) -> Tensor:
    return _along_rows(x.transpose(-3, -2), b.mT).transpose(-3, -2)

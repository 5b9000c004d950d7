"""The meaning of the polyline path mask, in PyTorch, in any precision: what the fast version is tested against.

On an (h, w) grid a[i, j] <= 0 is the log decay of the step between columns j - 1 and j in row i, and b[i, j] that of
the step between rows i - 1 and i in column j. The path from query (i, j) to key (k, l) follows the query's row to
column l, then that column to row k (PPMA, arXiv:2506.15940, section 3)::

    R[i, j, l] = sum of a[i, t] for min(j, l) < t <= max(j, l)          K[l, i, k] = the same sum of b[t, l]
    M[(i, j), (k, l)] = R[i, j, l] + K[l, i, k]                         L = exp(M)

The transpose of L is the other path: the query's column first, then the key's row.
"""

from itertools import product

import torch
from torch import Tensor


def log_mask(a: Tensor, b: Tensor) -> Tensor:
    """M, path by path: a, b (..., h, w) -> (..., h * w, h * w)."""
    h, w = a.shape[-2:]

    def path(i: int, j: int, k: int, m: int) -> Tensor:
        along_row = a[..., i, min(j, m) + 1 : max(j, m) + 1].sum(-1)
        return along_row + b[..., min(i, k) + 1 : max(i, k) + 1, m].sum(-1)

    pixels = list(product(range(h), range(w)))
    return torch.stack([torch.stack([path(*query, *key) for key in pixels], -1) for query in pixels], -2)


def reference(v: Tensor, a: Tensor, b: Tensor, *, transposed: bool = False) -> Tensor:
    """The arguments of :func:`vmamba.kernels.polyline_mask.polyline_mask` -> L v or L^T v, (..., h, w, d)."""
    mask = log_mask(a, b).exp()
    return ((mask.mT if transposed else mask) @ v.flatten(-3, -2)).unflatten(-2, a.shape[-2:])

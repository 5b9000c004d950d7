"""Summing routes back into a map and gating it: the end of a mixer that scans along routes (Vim, arXiv:2401.09417).

out[b, p] = silu(z[b, p]) / divisor * sum over visits v of y[b, inverse[v, p]]
"""

import torch
from torch import Tensor

from vmamba.kernels import gated_merge_reference
from vmamba.kernels.backends import choose, plain
from vmamba.kernels.routes import Table


def gated_merge(
    y: Tensor, z: Tensor, table: Table, *, divisor: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Sum what the routes give for each pixel, divide, and multiply by silu(z).

    Args:
        y: (b, k, l, d), the routes' results.
        z: (b, p, d), the gate in image order; any strides.
        table: the routes over p pixels (``Scan.table``).
        divisor: of the sums; the number of routes for their mean.
        dtype: of the result; by default the wider one of y's and z's.

    Returns:
        (b, p, d), computed in float32 at least.

    Raises:
        ValueError: shapes do not fit.
    """
    (k, length), pixels = table.routes.shape, table.inverse.shape[1]
    b, d = y.shape[0], y.shape[-1]
    if y.shape != (b, k, length, d) or z.shape != (b, pixels, d):
        expected = f"{('b', k, length, 'd')} and {('b', pixels, 'd')}"
        raise ValueError(f"y and z must be {expected} for these routes, got {tuple(y.shape)} and {tuple(z.shape)}")
    dtype = dtype or torch.promote_types(y.dtype, z.dtype)
    if plain(y, z):
        return choose("gated_merge", "", y, z).forward(y, z, table, divisor, dtype)
    return gated_merge_reference.forward(y, z, table, divisor, dtype)  # has gradients

"""Reading a map along routes, and summing routes back into a map: two gathers, each the other's gradient.

    gather: y[b, k, l] = x[b, routes[k, l]]          merge: x[b, p] = sum over visits v of y[b, inverse[v, p]]

``routes`` (k, l) holds row numbers of x, ``inverse`` (v, p) row numbers of y flattened to (k * l); the number one past
the last row stands for a zero. No atomics: both directions are deterministic.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """Routes (k, l) over p rows, and where each row is visited, (v, p)."""

    routes: Tensor
    inverse: Tensor


def table_of(routes: Tensor, rows: int) -> Table:
    """The table of ``routes`` (k, l), integers from 0 to ``rows``, where ``rows`` stands for a zero.

    Raises:
        ValueError: an entry is out of range.
    """
    if routes.ndim != 2 or routes.min() < 0 or routes.max() > rows:
        span = f"{tuple(routes.shape)} from {int(routes.min())} to {int(routes.max())}"
        raise ValueError(f"routes must be (k, l) with numbers from 0 to {rows}, got {span}")
    flat = routes.reshape(-1)
    row, step = torch.sort(flat, stable=True)
    visits = torch.bincount(flat, minlength=rows + 1)[:rows]
    first = torch.cumsum(visits, 0) - visits
    real = row < rows
    row, step = row[real], step[real]
    inverse = torch.full((max(int(visits.max()), 1), rows), flat.numel())
    inverse[torch.arange(row.numel()) - first[row], row] = step
    return Table(routes.contiguous(), inverse)


def gather(x: Tensor, table: Table) -> Tensor:
    """x (b, p, d) -> (b, k, l, d) in x's dtype."""
    return torch.ops.vmamba.route_gather(x, *table)


def merge(y: Tensor, table: Table) -> Tensor:
    """y (b, k, l, d) -> (b, p, d) in y's dtype, summed in float32 at least."""
    return torch.ops.vmamba.route_merge(y, *table)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (any shape) of x (b, p, d); p stands for a zero row."""
    flat = index.reshape(-1)
    found = x.index_select(1, flat.clamp(max=x.shape[1] - 1))
    found.mul_((flat < x.shape[1])[:, None]) if bool((flat == x.shape[1]).any()) else None
    return found.unflatten(1, index.shape)


@torch.library.custom_op("vmamba::route_gather", mutates_args=())
def _gather(x: Tensor, routes: Tensor, inverse: Tensor) -> Tensor:
    return _rows(x, routes)


@torch.library.custom_op("vmamba::route_merge", mutates_args=())
def _merge(y: Tensor, routes: Tensor, inverse: Tensor) -> Tensor:
    visits = _rows(y.flatten(1, 2), inverse)
    return visits.sum(1, dtype=torch.promote_types(y.dtype, torch.float32)).to(y.dtype)


@_gather.register_fake
def _(x, routes, inverse):
    return x.new_empty(x.shape[0], *routes.shape, x.shape[2])


@_merge.register_fake
def _(y, routes, inverse):
    return y.new_empty(y.shape[0], inverse.shape[1], y.shape[3])


def _keep_table(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


_gather.register_autograd(lambda ctx, g: (_merge(g, *ctx.saved_tensors), None, None), setup_context=_keep_table)
_merge.register_autograd(lambda ctx, g: (_gather(g, *ctx.saved_tensors), None, None), setup_context=_keep_table)

"""Reading a map along routes, and summing routes back into a map: two gathers, each the other's gradient.

    gather: y[b, k, l] = x[b, routes[k, l]]          merge: x[b, p] = sum over visits v of y[b, inverse[v, p]]

``routes`` (k, l) holds row numbers of x, ``inverse`` (v, p) row numbers of y flattened to (k * l); the number one past
the last row stands for a zero. No atomics: both directions are deterministic.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.kernels.backends import choose, plain
from vmamba.kernels.operator import operator


class Table(NamedTuple):
    """Routes (k, l) over p rows and where each row is visited, (v, p).

    Both are int32. ``padded``: a zero is read in either direction; ``once``: no route visits a row twice;
    ``straight``: a single route that reads every row in order, so that nothing has to be moved.
    """

    routes: Tensor
    inverse: Tensor
    padded: bool
    once: bool
    straight: bool = False


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
    padded = bool((flat == rows).any() or (inverse == flat.numel()).any())
    ordered = routes.sort(1).values
    once = not bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < rows)).any())
    straight = len(routes) == 1 and torch.equal(flat, torch.arange(rows, dtype=flat.dtype))
    return Table(routes.int().contiguous(), inverse.int(), padded, once, straight)


def gather(x: Tensor, table: Table) -> Tensor:
    """x (b, p, d) -> (b, k, l, d) in x's dtype; x itself, in other words, where the route is straight."""
    if table.straight:
        return x[:, None]
    if plain(x):
        return _gathered(x, *table[:3])
    return torch.ops.vmamba.route_gather(x, *table[:3])


def merge(y: Tensor, table: Table) -> Tensor:
    """y (b, k, l, d) -> (b, p, d) in y's dtype, summed in float32 at least; y itself where the route is straight."""
    if table.straight:
        return y[:, 0]
    if plain(y):
        return _merged(y, *table[:3])
    return torch.ops.vmamba.route_merge(y, *table[:3])


def _gathered(x: Tensor, routes: Tensor, inverse: Tensor, padded: bool) -> Tensor:
    return choose("routes", "", x).rows(x, routes.reshape(1, -1), padded).unflatten(1, routes.shape)


def _merged(y: Tensor, routes: Tensor, inverse: Tensor, padded: bool) -> Tensor:
    return choose("routes", "", y).rows(y.flatten(1, 2), inverse, padded)


@operator("route_gather")
def _gather(x: Tensor, routes: Tensor, inverse: Tensor, padded: bool) -> Tensor:
    return _gathered(x, routes, inverse, padded)


@operator("route_merge")
def _merge(y: Tensor, routes: Tensor, inverse: Tensor, padded: bool) -> Tensor:
    return _merged(y, routes, inverse, padded)


@_gather.register_fake
def _(x, routes, inverse, padded):
    return x.new_empty(x.shape[0], *routes.shape, x.shape[2])


@_merge.register_fake
def _(y, routes, inverse, padded):
    return y.new_empty(y.shape[0], inverse.shape[1], y.shape[3])


def _keep_table(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])
    ctx.padded = inputs[3]


def _transposed(operator):
    return lambda ctx, grad: (operator(grad, *ctx.saved_tensors, ctx.padded), None, None, None)


_gather.register_autograd(_transposed(_merge), setup_context=_keep_table)
_merge.register_autograd(_transposed(_gather), setup_context=_keep_table)

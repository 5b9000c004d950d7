"""Scans: in which order a 2D map is read as sequences. One file per scan, and the file's name is the scan's name.

Each file has one function ``routes(h, w) -> (k, l)`` of pixel numbers ``y * w + x``; ``h * w`` stands for a zero.
A user's own function, or ``"package.module"`` with such a function, is a scan too::

    >>> Scan("cross").table(2, 3).routes[1].tolist()
    [0, 3, 1, 4, 2, 5]
"""

import difflib
import pkgutil
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vmamba.kernels.routes import Table, gather, merge, table_of

Routes = Callable[[int, int], Tensor]


def list_scans() -> list[str]:
    """Names of the scans in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_routes(scan: "str | Routes") -> Routes:
    """The ``routes`` function of a scan given by name, by ``"package.module"`` or directly.

    Raises:
        ValueError: the name is unknown, or its module has no ``routes``.
    """
    if callable(scan):
        return scan
    names = list_scans()
    if "." not in scan and scan not in names:
        near = difflib.get_close_matches(scan, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"unknown scan {scan!r}{hint}; choose from {', '.join(names)}, or give a function or 'pkg.module'"
        )
    module = import_module(scan if "." in scan else f"{__name__}.{scan}")
    if not hasattr(module, "routes"):
        raise ValueError(f"scan module {scan!r} has no function routes(h, w) -> (k, l)")
    return module.routes


class Scan:
    """A scan order as a pair of functions, each the other's gradient.

    Args:
        scan: a name from :func:`list_scans`, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.
    """

    def __init__(self, scan: "str | Routes" = "cross") -> None:
        self.routes = find_routes(scan)
        self.name = scan if isinstance(scan, str) else getattr(scan, "__name__", "routes")
        self.count = self.routes(2, 2).shape[0]
        self._key = self.name if isinstance(scan, str) else f"{self.name} {id(scan)}"
        _scans[self._key] = self.routes

    def __repr__(self) -> str:
        return f"Scan({self.name!r})"

    def table(self, h: int, w: int, device: "torch.device | str" = "cpu", *, per_route: bool = False) -> Table:
        """The index tables of an (h, w) grid; ``per_route`` for maps (b, h, w, k, d) where route k reads slot k."""
        h, w = range(h).stop, range(w).stop  # plain numbers: compiling specialises on the size
        key = self._key, h, w, torch.device(device), per_route
        if not torch.compiler.is_dynamo_compiling():
            return _table(*key)
        shape, flags = _facts(*key)
        routes, inverse = torch.ops.vmamba.route_table(*key, *shape)
        return Table(routes, inverse, *flags)

    def split(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, k, l, d): the map read along each route."""
        b, h, w, d = x.shape
        return gather(x.reshape(b, h * w, d), self.table(h, w, x.device))

    def split_each(self, x: Tensor) -> Tensor:
        """(b, h, w, k, d) -> (b, k, l, d): route k reads slot k of the map."""
        b, h, w, k, d = x.shape
        return gather(x.reshape(b, h * w * k, d), self.table(h, w, x.device, per_route=True))

    def merge(self, y: Tensor, h: int, w: int) -> Tensor:
        """(b, k, l, d) -> (b, h, w, d): every step goes back to its pixel, and the routes are summed."""
        return merge(y, self.table(h, w, y.device)).unflatten(1, (h, w))


_scans: dict[str, Routes] = {}


@torch.compiler.assume_constant_result
def _facts(*key) -> tuple[tuple[int, ...], tuple[bool, bool]]:
    """What compiling must know of a table: the shapes of its tensors, and its flags."""
    table = _table(*key)
    return (*table.routes.shape, *table.inverse.shape), (table.padded, table.once)


@torch.library.custom_op("vmamba::route_table", mutates_args=())
def _copy(
    scan: str, h: int, w: int, device: torch.device, per_route: bool, k: int, length: int, visits: int, rows: int
) -> tuple[Tensor, Tensor]:
    table = _table(scan, h, w, device, per_route)
    return table.routes.clone(), table.inverse.clone()


@_copy.register_fake
def _(scan, h, w, device, per_route, k, length, visits, rows):
    sizes = (k, length), (visits, rows)
    return tuple(torch.empty(size, dtype=torch.int32, device=device) for size in sizes)


@lru_cache(maxsize=512)
def _table(scan: str, h: int, w: int, device: torch.device, per_route: bool) -> Table:
    routes = _scans.get(scan) or find_routes(scan)
    with _disable_current_modes(), torch.device("cpu"):  # real numbers, also where a model is traced
        order = routes(h, w)
        pixels = h * w
        if per_route:  # slot k of pixel p is row p * k + slot
            k = order.shape[0]
            slot = torch.arange(k)[:, None]
            order = torch.where(order == pixels, pixels * k, order * k + slot)
            pixels = pixels * k
        table = table_of(order, pixels)
        return table._replace(routes=table.routes.to(device), inverse=table.inverse.to(device))

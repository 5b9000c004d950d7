"""Scans: in which order a 2D map is read as sequences. One file per scan, and the file's name is the scan's name.

Each file has one function ``routes(h, w) -> (k, l)`` of pixel numbers ``y * w + x``; ``h * w`` stands for a zero.
One that takes ``routes(*grid)`` reads volumes (d, h, w) as well, with as many routes: numbers count through any grid.
A user's own function is a scan too, and so is a ``functools.partial`` that sets a scan's parameters::

    >>> Scan("cross").table(2, 3).routes[1].tolist()
    [0, 3, 1, 4, 2, 5]
    >>> Scan(partial(local.routes, window=7))
    Scan('local(window=7)')

A scan's name is text from which it is found again, in another process too: ``"cross"``, ``"local(window=7)"``,
``"package.module"`` with such a function, or ``"package.module.function"``.
"""

import ast
import difflib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from vmamba.kernels.routes import Table, gather, merge, table_of

Routes = Callable[..., Tensor]


def list_scans() -> list[str]:
    """Names of the scans in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_routes(scan: "str | Routes | Any") -> Routes:
    """The function ``routes(h, w) -> (k, l)`` of a scan.

    Args:
        scan: a name from :func:`list_scans`, ``"package.module"`` or ``"package.module.function"``, each with
            parameters where it takes any, ``"local(window=7)"``; or such a function; or what has one as ``routes``:
            a module, a :class:`Scan`.

    Raises:
        ValueError: the name is unknown, its module has no ``routes``, or its parameters are others.
    """
    routes = getattr(scan, "routes", scan)
    if callable(routes):
        return cast(Routes, routes)
    if not isinstance(scan, str):
        raise ValueError(f"a scan is a name, a function routes(h, w) -> (k, l) or a module with one, got {scan!r}")
    path, parameters = _parse(scan)
    routes = _import(path)
    if not parameters:
        return routes
    try:
        inspect.signature(routes).bind(1, 1, **parameters)
    except TypeError as error:
        raise ValueError(f"scan {scan!r}: {error}; it takes {inspect.signature(routes)}") from None
    return partial(routes, **parameters)


def name_of(routes: Routes) -> str | None:
    """The name by which :func:`find_routes` finds ``routes``; None where there is none, as for a lambda."""
    function, parameters = routes, {}
    if isinstance(routes, partial) and not routes.args:
        function, parameters = routes.func, routes.keywords
    path = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', None)}"
    if path.startswith(f"{__name__}."):
        path = path.removeprefix(f"{__name__}.").removesuffix(".routes")
    listed = ", ".join(f"{key}={value!r}" for key, value in sorted(parameters.items()))
    name = f"{path}({listed})" if parameters else path
    try:
        return name if _import(path) is function and _parse(name) == (path, parameters) else None
    except ValueError:
        return None


def _parse(name: str) -> tuple[str, dict[str, Any]]:
    """A name's path and its parameters."""
    try:
        tree = ast.parse(name, mode="eval").body
        if not isinstance(tree, ast.Call):
            return name, {}
        if not tree.args:
            return ast.unparse(tree.func), {str(word.arg): ast.literal_eval(word.value) for word in tree.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"scan {name!r} must read name or name(parameter=value), values being numbers, strings or tuples")


def _import(path: str) -> Routes:
    names = list_scans()
    if "." not in path and path not in names:
        near = difflib.get_close_matches(path, names, n=3)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise ValueError(
            f"unknown scan {path!r}{hint}; choose from {', '.join(names)}, or give a function or 'pkg.module'"
        )
    try:
        found = pkgutil.resolve_name(path if "." in path else f"{__name__}.{path}")
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot find scan {path!r}: {error}") from error
    routes = getattr(found, "routes", found)
    if not callable(routes):
        raise ValueError(f"scan module {path!r} has no function routes(h, w) -> (k, l)")
    return cast(Routes, routes)


class Scan(nn.Module):
    """A scan order as two functions, each the other's gradient; a module without parameters, shown with its mixer.

    Scans that are the same function with the same parameters share their tables. A scan is pickled by the name of its
    function, so a lambda cannot be.

    Args:
        scan: what :func:`find_routes` takes: a name, a function ``routes(h, w) -> (k, l)``, a module with one.
    """

    def __init__(self, scan: "str | Routes | Any" = "cross") -> None:
        super().__init__()
        self.routes = find_routes(scan)
        self.name, self._key = _remember(self.routes)
        self.sides = _sides(self.routes)
        self.count = self.order(*(2,) * (self.sides or 2)).shape[0]

    def __repr__(self) -> str:
        return f"Scan({self.name!r})"

    def __reduce__(self):
        return Scan, (self.routes,), {"training": self.training}

    def order(self, *grid: int) -> Tensor:
        """(k, l), the routes of a grid on the CPU, also where a model is traced or made on the meta device."""
        return _order(self.routes, grid)

    def table(self, h: int, w: int, device: "torch.device | str" = "cpu", *, per_route: bool = False) -> Table:
        """The index tables of an (h, w) grid; ``per_route`` for maps (b, h, w, k, d) where route k reads slot k."""
        return self.grid_table((h, w), device, per_route=per_route)

    def grid_table(
        self, grid: Sequence[int], device: "torch.device | str" = "cpu", *, per_route: bool = False
    ) -> Table:
        """:meth:`table` of a grid with any number of sides.

        Raises:
            ValueError: the scan reads grids with another number of sides.
        """
        grid = tuple(range(side).stop for side in grid)  # plain numbers: compiling specialises on the size
        if not torch.compiler.is_dynamo_compiling():
            return self._find(grid, torch.device(device), per_route)
        name, *flags = self._prepare(grid, torch.device(device), per_route)
        return Table(getattr(_prepared, f"routes_{name}"), getattr(_prepared, f"inverse_{name}"), *flags)

    def _find(self, grid: tuple[int, ...], device: torch.device, per_route: bool) -> Table:
        if self.sides not in (None, len(grid)):
            advice = "raster, bidirectional, serpentine and functions routes(*grid) read any grid"
            raise ValueError(f"scan {self.name!r} reads grids of {self.sides} sides, got {grid}; {advice}")
        return _table(self._key, grid, device, per_route)

    @torch.compiler.assume_constant_result
    def _prepare(self, grid: tuple[int, ...], device: torch.device, per_route: bool) -> tuple[str, bool, bool, bool]:
        """Before a graph is made: the name of its table in ``_prepared``, and the table's flags."""
        table = self._find(grid, device, per_route)
        name = str(id(table.routes))
        setattr(_prepared, f"routes_{name}", table.routes)
        setattr(_prepared, f"inverse_{name}", table.inverse)
        return name, *table[2:]

    def split(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, k, l, d): the map read along each route."""
        return gather(x.flatten(1, -2), self.grid_table(x.shape[1:-1], x.device))

    def split_each(self, x: Tensor) -> Tensor:
        """(b, h, w, k, d) -> (b, k, l, d): route k reads slot k of the map."""
        return gather(x.flatten(1, -2), self.grid_table(x.shape[1:-2], x.device, per_route=True))

    def merge(self, y: Tensor, *grid: int) -> Tensor:
        """(b, k, l, d) -> (b, h, w, d): every step goes back to its pixel, and the routes are summed."""
        return merge(y, self.grid_table(grid, y.device)).unflatten(1, grid)


_scans: dict[str, Routes] = {}  # by key, so that equal scans share tables


def _remember(routes: Routes) -> tuple[str, str]:
    """Name and key of ``routes``; the key has a number where the name does not lead to this very function."""
    name = name_of(routes)
    if name is not None:
        known = _scans.setdefault(name, routes)
        if getattr(known, "func", known) is getattr(routes, "func", routes):
            return name, name
    name = name or getattr(routes, "__qualname__", type(routes).__qualname__)
    _scans[f"{name}#{id(routes)}"] = routes
    return name, f"{name}#{id(routes)}"


class _Prepared:
    """Tables as attributes, each under a name of its own: what compiled code reads without a call."""


_prepared = _Prepared()


def _sides(routes: Routes) -> int | None:
    """How many sides the grids of ``routes`` have; None for any number."""
    parameters = inspect.signature(routes).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Tensors made inside serve everywhere later: whatever mode is on, they are on the CPU and fit for training."""
    with torch.inference_mode(False), _disable_current_modes(), torch.device("cpu"):
        yield


def _order(routes: Routes, grid: tuple[int, ...]) -> Tensor:
    with _ordinary_tensors():
        order = routes(*grid)
    if not isinstance(order, Tensor) or order.ndim != 2 or order.is_floating_point():
        got = f"{order.dtype} {tuple(order.shape)}" if isinstance(order, Tensor) else repr(order)
        raise ValueError(f"routes{grid} of a scan must be an integer tensor (k, l), got {got}")
    return order


@lru_cache(maxsize=512)
def _table(scan: str, grid: tuple[int, ...], device: torch.device, per_route: bool) -> Table:
    order = _order(_scans[scan], grid)
    with _ordinary_tensors():
        return as_table(order, math.prod(grid), device, per_route)


def as_table(order: Tensor, pixels: int, device: "torch.device | str", per_route: bool) -> Table:
    """The table of routes (k, l) over ``pixels``; ``per_route`` as of :meth:`Scan.table`."""
    if per_route:  # slot k of pixel p is row p * k + slot
        k = len(order)
        order = torch.where(order == pixels, pixels * k, order * k + torch.arange(k)[:, None])
        pixels *= k
    table = table_of(order, pixels)
    return table._replace(routes=table.routes.to(device), inverse=table.inverse.to(device))

"""Networks that see some cells of an image alone, for pre-training by masked images.

Whatever mixes positions is told which ones are hidden: convolutions see zeros there, norms over positions take their
statistics elsewhere (SparK, arXiv:2301.03580), and scans leave them out, so that a state-space model reads visible
tokens alone, one after the other (MambaMIM, arXiv:2408.08070). The features of visible cells then do not depend on
what lies in hidden ones. A cell covers as many pixels of a finer map as it takes: the mask is the same in all stages.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from vmamba.block import Conv2d
from vmamba.kernels.routes import Table
from vmamba.scans import Scan, as_table

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


class Sight:
    """Which cells a network sees; outside of :meth:`on` it sees everything, as without a sight.

    Args:
        network: gets hooks on its convolutions and norms, and scans that ask this object what to read.
        axes: sides of its images, 2 or 3.
        mixing: further kinds of modules (b, c, *grid) -> (b, c, *grid) that mix positions and shall see zeros at hidden
            ones.
    """

    def __init__(self, network: nn.Module, axes: int, mixing: Sequence[type[nn.Module]] = ()) -> None:
        self.axes = axes
        self.cells: Tensor | None = None
        self.order: Tensor | None = None
        self._kept: dict[Any, Any] = {}  # masks and tables of the cells that are set
        self._grids: list[tuple[int, ...]] = []
        self._convolutions = [m for m in network.modules() if isinstance(m, CONVOLUTIONS)]
        for module in list(network.modules()):
            if isinstance(module, (*CONVOLUTIONS, *mixing)) and set(getattr(module, "kernel_size", ())) != {1}:
                module.register_forward_pre_hook(self._blank_last if isinstance(module, Conv2d) else self._blank_first)
            if isinstance(module, NORMS):
                module.register_forward_pre_hook(self._pick)
                module.register_forward_hook(self._put_back)
            for name, child in list(module._modules.items()):  # also one that has two names
                if isinstance(child, Scan):
                    setattr(module, name, VisibleScan(child, self))

    @contextmanager
    def on(self, cells: Tensor, order: Tensor | None = None) -> Iterator[None]:
        """See the cells that are true in ``cells``, (*cells) booleans on the CPU, the same ones in every sample.

        ``order``: numbers of the cells in the order in which scans of the coarsest map read them, if not in their own.
        """
        try:
            self.cells, self.order, self._kept = cells, order, {}
            yield
        finally:
            self.cells, self.order, self._kept = None, None, {}

    @contextmanager
    def noise(self) -> Iterator[None]:
        """Convolutions leave random numbers at hidden places of their results, which nothing may read."""

        def fill(module: nn.Module, _: Any, y: Tensor) -> Tensor:
            last = isinstance(module, Conv2d)
            mask = self.mask(y.shape[1:-1] if last else y.shape[2:], y.device)
            return torch.where(mask[..., None] if last else mask, y, torch.randn_like(y))

        handles = [module.register_forward_hook(fill) for module in self._convolutions]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def mask(self, grid: Sequence[int], device: "torch.device | str" = "cpu") -> Tensor:
        """(*grid) booleans: where a map of this size is visible. ValueError if cells do not cover it evenly."""
        key = tuple(grid), torch.device(device)
        if key not in self._kept:
            assert self.cells is not None
            mask = self.cells
            for axis, (side, count) in enumerate(zip(grid, mask.shape, strict=True)):
                if side % count:
                    raise ValueError(f"a map of {tuple(grid)} has no whole cells of an image of {tuple(mask.shape)}")
                mask = mask.repeat_interleave(side // count, axis)
            self._kept[key] = mask.to(device)
        return self._kept[key]

    def table(self, scan: Scan, grid: tuple[int, ...], device: "torch.device | str", per_route: bool) -> Table:
        """The index table of ``scan`` without the hidden pixels; see :meth:`Scan.grid_table`."""
        key = scan.name, id(scan.routes), grid, torch.device(device), per_route
        if key not in self._kept:
            order = visible_routes(scan.order(*grid), self.mask(grid).flatten())
            if self.order is not None and self.mask(grid).numel() == cast(Tensor, self.cells).numel():
                order = self.order[None]
            self._kept[key] = as_table(order, self.mask(grid).numel(), device, per_route)
        return self._kept[key]

    def _where(self, grid: Sequence[int], device: torch.device) -> Tensor:
        """Numbers of the visible pixels of a map."""
        key = "where", tuple(grid), device
        if key not in self._kept:
            self._kept[key] = self.mask(grid).flatten().nonzero()[:, 0].to(device)
        return self._kept[key]

    def _blank_first(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.cells is None:
            return None
        x, *rest = inputs
        return x.masked_fill(~self.mask(x.shape[2:], x.device), 0), *rest

    def _blank_last(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.cells is None:
            return None
        x, *rest = inputs
        return x.masked_fill(~self.mask(x.shape[1:-1], x.device)[..., None], 0), *rest

    def _pick(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.cells is None:
            return None
        x, *rest = inputs
        self._grids.append(tuple(x.shape[2:]))
        seen = x.flatten(2).index_select(2, self._where(x.shape[2:], x.device))
        return seen.reshape(*seen.shape, *(1,) * (x.ndim - 3)), *rest

    def _put_back(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if self.cells is None:
            return None
        grid, seen = self._grids.pop(), output.flatten(2)
        pixels = self.mask(grid).numel()
        whole = seen.new_zeros(*seen.shape[:2], pixels).index_copy(2, self._where(grid, seen.device), seen)
        return whole.unflatten(2, grid)


class VisibleScan(Scan):
    """A scan that reads what is visible, of maps of as many sides as the image.

    Args:
        scan: the scan of the whole map. sight: what is visible.
    """

    def __init__(self, scan: Scan, sight: Sight) -> None:
        super().__init__(scan.routes)
        self.sight = sight

    def grid_table(
        self, grid: Sequence[int], device: "torch.device | str" = "cpu", *, per_route: bool = False
    ) -> Table:
        """The table of the visible pixels; that of the whole grid where everything is visible."""
        if self.sight.cells is None or len(grid) != self.sight.axes:
            return super().grid_table(grid, device, per_route=per_route)
        return self.sight.table(self, tuple(grid), device, per_route)


def visible_routes(order: Tensor, visible: Tensor) -> Tensor:
    """The routes (k, l) over p pixels without hidden ones: (k, n), shorter ones filled up by the number p, a zero.

    Args:
        order: pixel numbers (k, l); p stands for a zero. visible: booleans (p).
    """
    pixels = visible.numel()
    kept = torch.cat([visible, visible.new_zeros(1)])[order]
    counts = kept.sum(1)
    routes = order.new_full((len(order), int(counts.max())), pixels)
    routes[torch.arange(routes.shape[1]) < counts[:, None]] = order[kept]
    return routes


def leak(run: Callable[[Tensor], Sequence[Tensor]], sight: Sight, x: Tensor, cells: Tensor) -> float:
    """How much visible places of the maps ``run(x)`` depend on hidden ones, over their deviation: 0 if all is covered.

    The convolutions fill hidden places with other random numbers in each of two runs; what mixes positions and was not
    told of the mask carries them to visible ones.

    Args:
        run: the network. sight: what it asks. x: (b, c, *grid) random numbers. cells: as of :meth:`Sight.on`.
    """
    with sight.on(cells), sight.noise(), torch.no_grad():
        worst = 0.0
        for a, b in zip(run(x), run(x), strict=True):
            mask = sight.mask(a.shape[2:], a.device)
            deviation = a.masked_select(mask).std().clamp(min=1e-12)
            worst = max(worst, float((a - b).masked_fill(~mask, 0).abs().max() / deviation))
    return worst

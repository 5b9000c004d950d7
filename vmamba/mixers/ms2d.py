"""MS2D: a fine and a coarse map of the same features, scanned each in its own order (MSVMamba, arXiv:2405.14174).

Of VMamba's four routes one stays at full resolution; the others run on a map of half the resolution, which is made by a
strided depthwise convolution and resized afterwards.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.block import Conv2d
from vmamba.mixers.selective import SelectiveMixer
from vmamba.scans import Scan


class Branch(NamedTuple):
    """One resolution: a depthwise convolution of ``conv`` x ``conv`` with ``stride``, then ``scan``.

    ``scan`` is a name, ``"package.module"`` or a function, or None for the mixer's own.
    """

    conv: int
    stride: int
    scan: "str | Callable | None" = None


FINE = Branch(conv=3, stride=1, scan="raster")
COARSE = Branch(conv=7, stride=2)
BRANCHES = {"fine": FINE, "coarse": COARSE}


@register_notrace_module
class MS2D(SelectiveMixer):
    """Per branch: convolution, SiLU, selective scan, resizing to the full map; then all branches are summed.

    Args:
        dim: channels c; the scans run on d = expand * c channels.
        state, expand, rank: as in :class:`SelectiveMixer`.
        scan: the order of the branches that name none: a scan's name, ``"package.module"``, or a function.
        branches: resolutions by name, in the order of their routes' parameters.
        route_norm: builds a norm of each scan's steps before a pixel's visits are summed, ``route_norm(d, device=...,
            dtype=...)``, shared by the branches; None for none.
        resize: ``resize(map, size=(h, w))`` on maps (b, d, h', w').
        **gated: ``gate``, ``norm`` (of the sum), ``linear``, ``device``, ``dtype`` of
            :class:`vmamba.mixers.gated.GatedMixer`.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 1,
        expand: float = 1.0,
        rank: int | None = None,
        scan: "str | Callable" = "chained",
        branches: Mapping[str, Branch] = BRANCHES,
        route_norm: Callable[..., nn.Module] | None = None,
        resize: Callable[..., Tensor] = F.interpolate,
        **gated,
    ):
        scans = [Scan(branch.scan or scan) for branch in branches.values()]
        routes = sum(order.count for order in scans)
        plain: dict[str, Any] = {"conv": 1, "act": nn.Identity}  # each branch has its own convolution and activation
        super().__init__(dim, routes=routes, state=state, expand=expand, rank=rank, **plain, **gated)
        dd: dict[str, Any] = {"device": gated.get("device"), "dtype": gated.get("dtype")}
        d = int(expand * dim)
        self.convs = nn.ModuleDict(
            {
                name: Conv2d(d, d, branch.conv, branch.stride, branch.conv // 2, groups=d, **dd)
                for name, branch in branches.items()
            }
        )
        self.scans, self.resize = scans, resize
        self.route_norm = None if route_norm is None else route_norm(d, **dd)

    def scan_map(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d), the branches' sum."""
        size, start, maps = x.shape[1:3], 0, []
        for conv, scan in zip(self.convs.values(), self.scans, strict=True):
            group = slice(start, start := start + scan.count)
            y = self._scanned(F.silu(conv(x)), scan, group)
            if y.shape[1:3] != size:
                y = self.resize(y.permute(0, 3, 1, 2), size=size).permute(0, 2, 3, 1)
            maps.append(y)
        return sum(maps[1:], maps[0])

    def _scanned(self, x: Tensor, scan: Scan, group: slice) -> Tensor:
        """(b, h', w', d) -> (b, h', w', d); ``route_norm`` acts on each visit of a pixel, before they are summed."""
        if self.route_norm is None:
            return self.scan_along(x, scan, group)
        h, w = x.shape[1:3]
        dtype = self.out_proj.weight.dtype
        if scan.table(h, w, x.device).inverse.shape[0] == 1:  # one visit: as well after the sum
            return self.route_norm(self.scan_along(x, scan, group).to(dtype))
        return scan.merge(self.route_norm(self.scan_steps(x, scan, group).to(dtype)), h, w)

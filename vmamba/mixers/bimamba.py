"""Mamba along routes, with a causal convolution in each: the mixers of Vision Mamba (arXiv:2401.09417, section 3.3).

A sequence (b, l, c) is the map (b, 1, l, c), on which the scan ``bidirectional`` reads forwards and backwards and
``raster`` forwards alone: there BiMamba is Mamba itself (arXiv:2312.00752).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.kernels.backends import eager, plain
from vmamba.kernels.causal_conv1d import causal_conv1d
from vmamba.kernels.gated_merge import gated_merge
from vmamba.kernels.mamba_inner import Mamba, mamba_inner
from vmamba.kernels.route_conv import route_conv
from vmamba.kernels.route_weights import Projections, route_weights
from vmamba.kernels.routes import Table
from vmamba.kernels.scan2d import scan2d
from vmamba.kernels.selective_scan import route_scan
from vmamba.mixers.selective import SelectiveMixer
from vmamba.narrow import Layer, watched
from vmamba.precision import autocasts
from vmamba.scans import Scan


class RouteConv(nn.Module):
    """A causal depthwise convolution and SiLU along each of k routes, with weights of its own for each.

    Args:
        channels: channels d. width: steps that a filter sees. routes: number k of routes.
    """

    def __init__(self, channels: int, width: int, *, routes: int = 1, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(routes, channels, 1, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(routes, channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Conv1d``: uniform within one over the square root of the width."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d) in image order, with the weights of the first route."""
        y = causal_conv1d(x.flatten(1, 2).mT, self.weight[0, :, 0], self.bias[0], activation="silu")
        return cast(Tensor, y).mT.unflatten(1, x.shape[1:3])


@register_notrace_module
class BiMamba(SelectiveMixer):
    """(b, h, w, c) -> (b, h, w, c): every route has its own convolution, projections and states; one scan for all.

    On two opposite routes this is Vim's published mixer ("v2"). Volumes (b, d, h, w, c) are mixed alike by scans that
    read them.

    Args:
        dim: channels c; the scans run on d = expand * c channels.
        conv: steps that the causal convolution sees.
        scan: the routes: a scan's name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.
        average: divide the sum of the routes by their number.
        **selective: ``state``, ``expand``, ``rank``, ``linear``, ``device``, ``dtype`` of :class:`SelectiveMixer`.
    """

    def __init__(
        self, dim: int, *, conv: int = 4, scan: "str | Callable" = "bidirectional", average: bool = True, **selective
    ):
        routes = Scan(scan)
        super().__init__(dim, routes=routes.count, conv=1, act=nn.Identity, norm=nn.Identity, **selective)
        dd: dict[str, Any] = {"device": selective.get("device"), "dtype": selective.get("dtype")}
        self.conv1d = RouteConv(self.D.shape[1], conv, routes=routes.count, **dd)
        self.scan, self.average = routes, average

    def run(self, x: Tensor, layers: Sequence[Layer], weights: Sequence[Tensor]) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        if type(self.gate) is not nn.SiLU:
            return super().run(x, layers, weights)
        (in_proj, out_proj), grid = layers, x.shape[1:-1]
        table = self.scan.grid_table(grid, x.device)
        if table.straight and x.is_cuda and (parameters := self._learned(x)):
            return out_proj(mamba_inner(x.flatten(1, -2), parameters)).unflatten(1, grid)
        x, z = in_proj(x).flatten(1, -2).chunk(2, -1)
        dtype = _type_of(self.out_proj, x.device)
        y = gated_merge(self.scan_routes(x, table), z, table, divisor=self.divisor, dtype=dtype)
        return out_proj(y).unflatten(1, grid)

    def _learned(self, x: Tensor) -> Mamba | None:
        """The parameters of the only route where gradients are asked for and all is of one wide type."""
        conv, into = self.conv1d, self.in_proj
        if type(into) is not nn.Linear or into.bias is not None or watched(into, cast(nn.Module, self.gate)):
            return None
        own = conv.weight[0, :, 0], conv.bias[0], self.x_proj[0], self.dt_proj[0], self.A_log[0], self.D[0]
        parameters = Mamba(into.weight, *own, self.dt_bias[0])
        wide = x.dtype in (torch.float32, torch.float64) and not autocasts(x.device.type)
        fits = wide and all(t.dtype is x.dtype for t in parameters) and eager(x, *parameters)
        return parameters if fits and not plain(x, *parameters) else None

    def scan_map(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d) in float32 (float64 for float64)."""
        grid = x.shape[1:-1]
        y = self.scan_routes(x.flatten(1, -2), self.scan.grid_table(grid, x.device))
        wide = torch.promote_types(y.dtype, torch.float32)
        return self.scan.merge(y.to(wide), *grid) / self.divisor

    @property
    def divisor(self) -> int:
        """What the sum of the routes is divided by."""
        return self.scan.count if self.average else 1

    def scan_routes(self, x: Tensor, table: Table) -> Tensor:
        """(b, p, d) -> (b, k, l, d): what every route gives, step by step.

        In float32 or wider; without gradients bfloat16 for bfloat16, in which the gated sum of routes is returned too.
        """
        u = route_conv(x, self.conv1d.weight[:, :, 0], self.conv1d.bias, table)
        delta, A, B, C = self.steps_of(u)
        free = u.dtype == torch.bfloat16 and plain(u, delta, A, self.D, self.dt_bias)
        options: dict[str, Any] = {"delta_bias": self.dt_bias, "delta_softplus": True}
        return route_scan(u, delta, A, B, C, self.D, out_dtype=torch.bfloat16 if free else None, **options)

    def steps_of(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u (b, k, l, d) -> delta (b, k, l, d), A (k, d, n), B and C (b, k, l, n)."""
        r, n, parameters = self.rank, self.state, (self.x_proj, self.dt_proj, self.A_log)
        if not plain(u, *parameters):
            dt, B, C = (u @ self.x_proj.mT).split([r, n, n], -1)
            return dt @ self.dt_proj.mT, self.decay(), B, C
        b, k = u.shape[:2]
        into, out, A = route_weights(Projections(*parameters), b, u.dtype)
        projected = torch.bmm(u.flatten(0, 1), into.mT)  # (b k, l, rank | maps)
        delta = torch.bmm(projected[..., : out.shape[1]], out).unflatten(0, (b, k))
        maps = projected.unflatten(0, (b, k))[..., out.shape[1] :]
        return delta, A, maps[..., :n], maps[..., n : 2 * n]


def _type_of(linear: nn.Module, device: torch.device) -> torch.dtype:
    """The type in which a linear layer computes."""
    dtype = cast(Tensor, linear.weight).dtype
    if type(linear) is nn.Linear and dtype != torch.float64 and autocasts(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


@register_notrace_module
class SharedBiMamba(SelectiveMixer):
    """(b, h, w, c) -> (b, h, w, c): routes that share all but their decay, after one convolution in image order ("v1").

    Args:
        dim: channels c; the scans run on d = expand * c channels.
        conv: steps that the causal convolution sees.
        scan: the routes, which are summed: a scan's name, ``"package.module"``, or a function.
        **selective: ``state``, ``expand``, ``rank``, ``linear``, ``device``, ``dtype`` of :class:`SelectiveMixer`.
    """

    def __init__(self, dim: int, *, conv: int = 4, scan: "str | Callable" = "bidirectional", **selective):
        super().__init__(dim, routes=1, conv=1, act=nn.Identity, norm=nn.Identity, **selective)
        dd: dict[str, Any] = {"device": selective.get("device"), "dtype": selective.get("dtype")}
        self.scan = Scan(scan)
        self.conv = RouteConv(self.D.shape[1], conv, **dd)
        self.A_log = nn.Parameter(self.A_log.detach().repeat(self.scan.count, 1, 1))

    def scan_map(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d) in float32 (float64 for float64)."""
        h, w = x.shape[1:3]
        k = self.scan.count
        projected = self.project(x).flatten(1, 2).expand(-1, -1, k, -1)  # (b, p, k, r + 2n)
        dt_proj, D, bias = (p.expand(k, *p.shape[1:]) for p in (self.dt_proj, self.D, self.dt_bias))
        table = self.scan.table(h, w, x.device)
        y = scan2d(x.flatten(1, 2), projected, dt_proj, self.decay(), D, bias, table)
        return y.unflatten(1, (h, w))

"""Selective scans of maps along routes: the parameters that mixers with one scan or several scans share."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.kernels.scan2d import scan2d
from vmamba.kernels.selective_scan import route_scan
from vmamba.mixers.gated import GatedMixer
from vmamba.mixers.heads import init_step_bias
from vmamba.scans import Scan


class SelectiveScans(nn.Module):
    """k selective scans of d channels; a mixer that derives from this class calls :meth:`make_scans` once."""

    def make_scans(self, channels: int, *, routes: int, state: int, rank: int, device=None, dtype=None) -> None:
        """Make the parameters of k = ``routes`` scans of d = ``channels``, n = ``state`` and r = ``rank``."""
        self.rank, self.state = rank, state
        dd = {"device": device, "dtype": dtype}
        self.x_proj = nn.Parameter(torch.empty(routes, rank + 2 * state, channels, **dd))
        self.dt_proj = nn.Parameter(torch.empty(routes, channels, rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(routes, channels, **dd))
        self.A_log = nn.Parameter(torch.empty(routes, channels, state, **dd))
        self.D = nn.Parameter(torch.empty(routes, channels, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -(1..n), D = 1, delta log-uniform in [1e-3, 0.1] (Mamba, arXiv:2312.00752, section 3.6)."""
        with torch.no_grad():
            for route in self.x_proj:
                nn.init.kaiming_uniform_(route, a=math.sqrt(5))
            nn.init.uniform_(self.dt_proj, -(self.rank**-0.5), self.rank**-0.5)
            init_step_bias(self.dt_bias)
            self.A_log.copy_(torch.arange(1, self.state + 1, device=self.A_log.device).log())
            self.D.fill_(1)

    def project(self, x: Tensor, group: slice | None = None, x_proj: Tensor | None = None) -> Tensor:
        """(..., d) -> (..., k, r + 2n): delta's factor, B and C of each pixel for the routes ``group`` (None: all).

        ``x_proj``: theirs, (k, r + 2n, d), where the caller has cast it to the type that autocast computes in.
        """
        x_proj = _of(self.x_proj, group) if x_proj is None else x_proj
        return F.linear(x, x_proj.flatten(0, 1)).reshape(*x.shape[:-1], *x_proj.shape[:2])

    def decay(self, group: slice | None = None) -> Tensor:
        """A, (k, d, n), of the routes ``group``; float32 or wider."""
        A_log = _of(self.A_log, group)
        return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))

    def step_bias(self, group: slice | None = None) -> Tensor:
        """What is added to delta before the softplus, (k, d), of the routes ``group``."""
        return _of(self.dt_bias, group)

    def scan_along(self, x: Tensor, scan: Scan, group: slice | None = None, x_proj: Tensor | None = None) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d) in float32 (float64 for float64): along each route of ``scan``, summed.

        ``group`` selects the parameters; it has as many routes as ``scan``. ``x_proj``: as in :meth:`project`.
        """
        pixels = x.flatten(1, 2)
        projected = self.project(pixels, group, x_proj)
        dt_proj, D, bias = _of(self.dt_proj, group), _of(self.D, group), self.step_bias(group)
        table = scan.grid_table(x.shape[1:3], x.device)
        A_log = _of(self.A_log, group)
        return scan2d(pixels, projected, dt_proj, A_log, D, bias, table, log_A=True).reshape(x.shape)

    def scan_steps(self, x: Tensor, scan: Scan, group: slice | None = None) -> Tensor:
        """(b, h, w, d) -> (b, k, l, d): what :meth:`scan_along` sums, step by step along each route."""
        dt, B, C = scan.split_each(self.project(x, group)).split([self.rank, self.state, self.state], -1)
        delta = dt @ _of(self.dt_proj, group).to(dt.dtype).mT
        A, D, bias = self.decay(group), _of(self.D, group), self.step_bias(group)
        return route_scan(scan.split(x), delta, A, B, C, D, delta_bias=bias, delta_softplus=True)


def _of(parameter: Tensor, group: slice | None) -> Tensor:
    """The part that the routes ``group`` have of a parameter (k, ...); itself for None."""
    return parameter if group is None else parameter[group]


class SelectiveMixer(SelectiveScans, GatedMixer):
    """A gated mixer with k selective scans; its ``scan_map`` calls :meth:`scan_along` for the routes that it reads.

    Args:
        dim: channels c; the scans run on d = expand * c channels.
        routes: number k of routes; each has parameters of its own.
        state: states n per channel.
        expand: d / c.
        rank: rank r of the projection that delta goes through; ceil(c / 16) by default.
        **gated: ``conv``, ``conv_bias``, ``gate``, ``act``, ``norm``, ``linear``, ``device``, ``dtype`` of
            :class:`GatedMixer`.
    """

    def __init__(
        self, dim: int, *, routes: int, state: int = 16, expand: float = 2.0, rank: int | None = None, **gated
    ):
        inner = int(expand * dim)
        super().__init__(dim, inner, **gated)
        dd = {"device": gated.get("device"), "dtype": gated.get("dtype")}
        self.make_scans(inner, routes=routes, state=state, rank=rank or math.ceil(dim / 16), **dd)

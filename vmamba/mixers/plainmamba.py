"""PlainMamba: snake scans that know their direction, in the form without gate that VCMamba uses.

Papers: PlainMamba (arXiv:2403.17695, section 3), VCMamba (arXiv:2509.04669).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.block import ChannelsFirst, Conv2d
from vmamba.kernels.routes import merge
from vmamba.kernels.scan2d import scan2d
from vmamba.norm import LayerNorm
from vmamba.scans import Scan, find_routes

START, RIGHT, LEFT, UP, DOWN = range(5)


def visits(h: int, w: int, scan: "str | Callable") -> Tensor:
    """(k, h * w): each route's pixels in the order in which it first reads them, then those that it leaves out."""
    routes = find_routes(scan)(h, w)
    k, steps = routes.shape
    first = torch.full((k, h * w + 1), steps)
    first = first.scatter_reduce(1, routes.long(), torch.arange(steps).expand(k, -1), "amin")
    return first[:, :-1].argsort(stable=True)


def directions(order: Tensor, w: int) -> Tensor:
    """(k, l) pixel numbers -> (k, l) numbers of the move that led to each: 0 start, 1 right, 2 left, 3 up, 4 down.

    A jump by fewer pixels than a row of ``w`` has counts as sideways.
    """
    move = order.diff(dim=1)
    sideways, across = torch.where(move > 0, RIGHT, LEFT), torch.where(move > 0, DOWN, UP)
    return F.pad(torch.where(move.abs() < w, sideways, across), (1, 0), value=START)


@register_notrace_module
class PlainMamba(nn.Module):
    """(b, h, w, c) -> (b, h, w, c): k routes that share all parameters, in each step t of route k::

        h[t] = exp(delta[t] A) h[t - 1] + delta[t] (B[t] + direction_B[move]) u[route[t]]
        y[route[t]] = C[t] h[t] + D u[route[t]]

    Only u is read along the route: delta, B and C of step t are those of the t-th pixel in image order, as in the
    original code. So the selection is a schedule over time, the same for all routes.

    Args:
        dim: channels c; the scans run on d = expand * c channels.
        state: states n per channel.
        expand: d / c.
        rank: rank r of the projection that delta goes through; ceil(c / 16) by default.
        conv: size of the depthwise convolution.
        scan: a scan's name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 16,
        expand: float = 2.0,
        rank: int | None = None,
        conv: int = 7,
        scan: "str | Callable" = "serpentine",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, self.rank, self.state = int(expand * dim), rank or math.ceil(dim / 16), state
        self.scan, self.order = Scan(scan), Scan(partial(visits, scan=scan))
        self.in_conv = ChannelsFirst(nn.Conv2d(dim, inner, 1, **dd), nn.BatchNorm2d(inner, **dd))
        self.conv = Conv2d(inner, inner, conv, padding=conv // 2, groups=inner, **dd)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.direction_B = nn.Parameter(torch.empty(5, state, **dd))
        self.norm = LayerNorm(inner, **dd)
        self.out_conv = ChannelsFirst(nn.ReLU(), nn.Conv2d(inner, dim, 1, **dd), nn.BatchNorm2d(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -(1..n), D = 1, directions from a truncated normal (0.02)."""
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.state + 1, device=self.A_log.device).log())
            self.D.fill_(1)
        nn.init.trunc_normal_(self.direction_B, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        y = self.scan_map(F.silu(self.conv(self.in_conv(x))))
        return self.out_conv(self.norm(y.to(self.x_proj.weight.dtype)))

    def scan_map(self, u: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d) in float32 (float64 for float64)."""
        h, w = u.shape[1:3]
        k = self.scan.count
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        shared = self.dt_proj.weight, A, self.D, 2 * self.dt_proj.bias  # the original adds this bias twice
        dt_proj, A, D, bias = (p.expand(k, *p.shape) for p in shared)
        y = scan2d(u.flatten(1, 2), self._scheduled(u), dt_proj, A, D, bias, self.scan.table(h, w, u.device))
        return y.unflatten(1, (h, w))

    def _scheduled(self, u: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h * w, k, r + 2n): [delta's factor | B | C] where route k reads a pixel."""
        h, w = u.shape[1:3]
        order, slots = (self.order.table(h, w, u.device, per_route=each) for each in (False, True))
        steps = self.x_proj(u).flatten(1, 2)[:, None]  # (b, 1, h * w, r + 2n)
        moves = self.direction_B.to(steps.dtype)[directions(order.routes, w)]  # (k, h * w, n)
        steps = steps + F.pad(moves, (self.rank, self.state))
        return merge(steps, slots).unflatten(1, (h * w, -1))

"""SSD2D: state-space duality (Mamba-2) along the routes of a 2D scan: the core of VMamba's "m2" variants."""

import math
from collections.abc import Callable

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.kernels.ssd import ssd
from vmamba.mixers.gated import GatedMixer
from vmamba.scans import Scan


@register_notrace_module
class SSD2D(GatedMixer):
    """Per route: dt, B and C are linear in the pixel, each head decays with one scalar, all routes are summed.

    Args:
        dim: channels c; the scan runs on d = expand * c channels.
        state: states n, shared by the heads of a route.
        expand: d / c.
        heads: heads that the d channels divide into; ceil(c / 16) by default.
        scan: a scan's name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.
        **gated: ``conv``, ``conv_bias``, ``gate``, ``act``, ``norm``, ``linear``, ``device``, ``dtype`` of
            :class:`GatedMixer`.

    Raises:
        ValueError: d is not a multiple of the number of heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 64,
        expand: float = 1.0,
        heads: int | None = None,
        scan: "str | Callable" = "cross",
        **gated,
    ):
        inner, heads = int(expand * dim), heads or math.ceil(dim / 16)
        if inner % heads:
            raise ValueError(f"{inner} inner channels (expand {expand} of {dim}) do not divide into {heads} heads")
        super().__init__(dim, inner, **gated)
        dd = {"device": gated.get("device"), "dtype": gated.get("dtype")}
        self.heads, self.state, self.scan = heads, state, Scan(scan)
        k = self.scan.count
        self.x_proj = nn.Parameter(torch.empty(k, heads + 2 * state, inner, **dd))
        self.dt_bias = nn.Parameter(torch.empty(k, heads, **dd))
        self.A_log = nn.Parameter(torch.empty(k, heads, **dd))
        self.D = nn.Parameter(torch.empty(k, heads, inner // heads, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -1, D = 1, dt bias uniform in [0, 0.1] (the published m2 setting)."""
        with torch.no_grad():
            for route in self.x_proj:
                nn.init.kaiming_uniform_(route, a=math.sqrt(5))
            nn.init.uniform_(self.dt_bias, 0, 0.1)
            self.A_log.zero_()
            self.D.fill_(1)

    def scan_map(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d) in float32 (float64 for float64)."""
        h, w = x.shape[1:3]
        k, width, _ = self.x_proj.shape
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        projected = F.linear(x, self.x_proj.flatten(0, 1)).unflatten(-1, (k, width))  # (b, h, w, k, heads + 2n)
        dt, B, C = self.scan.split_each(projected).split([self.heads, self.state, self.state], -1)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)[:, None])
        A = -torch.exp(self.A_log.to(wide))
        heads = self.scan.split(x).unflatten(-1, (self.heads, -1))  # (b, k, l, heads, d / heads)
        y = ssd(heads, dt, A, B, C, self.D)
        return self.scan.merge(y.flatten(-2), h, w)

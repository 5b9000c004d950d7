"""SS2D: selective scans along the routes of a 2D scan (VMamba, arXiv:2401.10166, section 4.2 and appendix A)."""

import math
from collections.abc import Callable

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.kernels.scan2d import scan2d
from vmamba.mixers.gated import GatedMixer
from vmamba.scans import Scan


@register_notrace_module
class SS2D(GatedMixer):
    """Per route: delta, B and C are linear in the pixel, the recurrence runs along the route, all routes are summed.

    Args:
        dim: channels c; the scan runs on d = expand * c channels.
        state: states n per channel.
        expand: d / c.
        rank: rank r of the projection that delta goes through; ceil(c / 16) by default.
        scan: a scan's name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.
        **gated: ``conv``, ``conv_bias``, ``gate``, ``act``, ``norm``, ``device``, ``dtype`` of :class:`GatedMixer`.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 16,
        expand: float = 2.0,
        rank: int | None = None,
        scan: "str | Callable" = "cross",
        **gated,
    ):
        inner = int(expand * dim)
        super().__init__(dim, inner, **gated)
        self.rank, self.state = rank or math.ceil(dim / 16), state
        dd = {"device": gated.get("device"), "dtype": gated.get("dtype")}
        self.scan = Scan(scan)
        k = self.scan.count
        self.x_proj = nn.Parameter(torch.empty(k, self.rank + 2 * state, inner, **dd))
        self.dt_proj = nn.Parameter(torch.empty(k, inner, self.rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(k, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(k, inner, state, **dd))
        self.D = nn.Parameter(torch.empty(k, inner, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -(1..n), D = 1, delta log-uniform in [1e-3, 0.1] (Mamba, arXiv:2312.00752, section 3.6)."""
        with torch.no_grad():
            for route in self.x_proj:
                nn.init.kaiming_uniform_(route, a=math.sqrt(5))
            nn.init.uniform_(self.dt_proj, -(self.rank**-0.5), self.rank**-0.5)
            low, high = math.log(1e-3), math.log(0.1)
            delta = torch.empty_like(self.dt_bias).uniform_(low, high).exp().clamp(min=1e-4)
            self.dt_bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus
            self.A_log.copy_(torch.arange(1, self.state + 1, device=self.A_log.device).log())
            self.D.fill_(1)

    def scan_map(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d) in float32 (float64 for float64)."""
        h, w = x.shape[1:3]
        k, width, _ = self.x_proj.shape
        projected = F.linear(x, self.x_proj.flatten(0, 1)).unflatten(-1, (k, width))  # (b, h, w, k, r + 2n)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        table = self.scan.table(h, w, x.device)
        y = scan2d(x.flatten(1, 2), projected.flatten(1, 2), self.dt_proj, A, self.D, self.dt_bias, table)
        return y.unflatten(1, (h, w))

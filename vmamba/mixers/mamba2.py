"""The Mamba-2 block (arXiv:2405.21060, section 7) along the routes of a 2D scan.

On a (1, l) grid with ``conv=CausalConv, scan="raster"`` it is the published block for sequences (state-spaces/mamba,
Apache-2.0) and loads its weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.gated_norm import GatedRMSNorm
from vmamba.kernels.ssd import ssd
from vmamba.mixers.depthwise import DepthwiseConv
from vmamba.mixers.heads import count_heads, init_step_bias
from vmamba.scans import Scan


@register_notrace_module
class Mamba2Mixer(nn.Module):
    """(b, h, w, c) -> (b, h, w, c): one projection gives gate, input, and B, C, dt of each route; routes are summed.

        z, x, BC, dt = W_in u     x, BC = silu(conv(x, BC))     y = sum over routes of ssd(x, dt, B, C)
        output = W_out rms_norm(y silu(z))

    Args:
        dim: channels c; the scan runs on d = expand * c channels.
        state: states n. expand: d / c.
        head_dim: channels p of a head; each head of a route has one decay.
        groups: groups of heads that share B and C.
        conv: builds the filter before the scan, ``conv(channels, device=..., dtype=...)``, on channels-last maps.
        norm: builds the output norm, ``norm(d, device=..., dtype=...)``, called with the map and the gate's map.
        scan: a scan's name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.
        device, dtype: of the parameters.

    Raises:
        ValueError: d does not divide into heads, or the heads into groups.
    """

    official_keys = ((r"^conv1d\.", "conv."),)

    def __init__(
        self,
        dim: int,
        *,
        state: int = 64,
        expand: float = 2.0,
        head_dim: int = 32,
        groups: int = 1,
        conv: Callable[..., nn.Module] = DepthwiseConv,
        norm: Callable[..., nn.Module] = GatedRMSNorm,
        scan: "str | Callable" = "cross",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scan, self.heads = Scan(scan), count_heads(dim, expand, head_dim)
        if self.heads % groups:
            raise ValueError(f"{self.heads} heads do not divide into {groups} groups")
        inner, k = self.heads * head_dim, self.scan.count
        self.layout = 2, groups, state  # (B, C) of a route
        self.widths = inner, k * 2 * groups * state, k * self.heads
        self.in_proj = nn.Linear(dim, inner + sum(self.widths), bias=False, **dd)
        self.conv = conv(sum(self.widths[:2]), **dd)
        self.dt_bias = nn.Parameter(torch.empty(k, self.heads, **dd))
        self.A_log = nn.Parameter(torch.empty(k, self.heads, **dd))
        self.D = nn.Parameter(torch.empty(k, self.heads, **dd))
        self.norm = norm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in [-16, -1], D = 1, dt log-uniform in [1e-3, 0.1]."""
        init_step_bias(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            self.D.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        inner, features, steps = self.widths
        z, mixed, dt = self.in_proj(x).split([inner, inner + features, steps], -1)
        x, BC = F.silu(self.conv(mixed)).split([inner, features], -1)
        return self.out_proj(self.norm(self.scan_map(x, BC, dt), z))

    def scan_map(self, x: Tensor, BC: Tensor, dt: Tensor) -> Tensor:
        """x (b, h, w, d), B and C (b, h, w, k 2 g n), dt (b, h, w, k m) -> (b, h, w, d), float32 or wider."""
        (h, w), k, groups = x.shape[1:3], self.scan.count, self.layout[1]

        def grouped(t: Tensor) -> Tensor:  # (b, k, l, m, ...) -> (b, k g, l, m / g, ...)
            return t.unflatten(3, (groups, -1)).transpose(2, 3).flatten(1, 2)

        BC = self.scan.split_each(BC.unflatten(-1, (k, -1))).unflatten(-1, self.layout)  # (b, k, l, 2, g, n)
        B, C = BC.transpose(2, 4).flatten(1, 2).unbind(2)  # (b, k g, l, n)
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        dt = self.scan.split_each(dt.unflatten(-1, (k, -1))).to(wide)
        A, D, bias = (p.to(wide).reshape(k * groups, -1) for p in (self.A_log, self.D, self.dt_bias))
        heads = self.scan.split(x).unflatten(-1, (self.heads, -1))  # (b, k, l, m, p)
        y = ssd(grouped(heads), grouped(dt), -A.exp(), B, C, D, dt_bias=bias, dt_softplus=True)
        y = y.unflatten(1, (k, groups)).transpose(2, 3).flatten(3)  # (b, k, l, d)
        return self.scan.merge(y, h, w)

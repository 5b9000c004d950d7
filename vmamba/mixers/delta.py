"""The (gated) delta rule along the routes of a 2D scan, in the block of Gated DeltaNet (arXiv:2412.06464, section 3.4).

DeltaNet (arXiv:2406.06484) is the same without decay. That all routes share keys, queries and values, which say what a
pixel is, and differ in how much they write and forget, is our choice: the papers know one direction only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.gated_norm import GatedRMSNorm
from vmamba.kernels.delta_rule import delta_rule
from vmamba.mixers.depthwise import DepthwiseConv
from vmamba.mixers.heads import count_heads, init_step_bias
from vmamba.scans import Scan


@register_notrace_module
class DeltaMixer(nn.Module):
    """(b, h, w, c) -> (b, h, w, c): each head writes values under keys along every route, and reads with queries.

        z, v q k, s = W_in u     v, q, k = silu(conv(v, q, k)), q and k of length 1     beta = sigmoid(s)
        g = -exp(A_log) softplus(s' + dt_bias)     y = sum over routes of delta_rule(q, k, v, beta, g)
        output = W_out (rms_norm(y) silu(z))

    Args:
        dim: channels c; the values have d = expand * c channels.
        state: channels n of a head's keys and queries. expand: d / c.
        head_dim: channels p of a head's values.
        decay: whether the state decays (Gated DeltaNet) or not (DeltaNet).
        conv: builds the filter before the scan, ``conv(channels, device=..., dtype=...)``, on channels-last maps.
        norm: builds the output norm, ``norm(d, device=..., dtype=...)``, called with the map and the gate's map; by
            default each head has a norm of its own, before the gate.
        scan: a scan's name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.
        device, dtype: of the parameters.

    Raises:
        ValueError: d does not divide into heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 32,
        expand: float = 2.0,
        head_dim: int = 32,
        decay: bool = True,
        conv: Callable[..., nn.Module] = DepthwiseConv,
        norm: Callable[..., nn.Module] | None = None,
        scan: "str | Callable" = "cross",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scan, self.heads = Scan(scan), count_heads(dim, expand, head_dim)
        self.inner, k, m = self.heads * head_dim, self.scan.count, self.heads
        self.widths = self.inner, m * state, m * state  # v, q, k
        self.in_proj = nn.Linear(dim, self.inner + sum(self.widths) + k * m * (1 + decay), bias=False, **dd)
        self.conv = conv(sum(self.widths), **dd)
        self.A_log = nn.Parameter(torch.empty(k, m, **dd)) if decay else None
        self.dt_bias = nn.Parameter(torch.empty(k, m, **dd)) if decay else None
        norm = norm or partial(GatedRMSNorm, groups=m, gate_first=False)
        self.norm = norm(self.inner, **dd)
        self.out_proj = nn.Linear(self.inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in [-16, -1], steps log-uniform in [1e-3, 0.1]."""
        if self.A_log is not None and self.dt_bias is not None:
            init_step_bias(self.dt_bias)
            with torch.no_grad():
                self.A_log.uniform_(1, 16).log_()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        z, mixed, steps = self.in_proj(x).tensor_split([self.inner, self.inner + sum(self.widths)], -1)
        return self.out_proj(self.norm(self.scan_map(F.silu(self.conv(mixed)), steps), z))

    def scan_map(self, x: Tensor, steps: Tensor) -> Tensor:
        """v, q, k (b, h, w, d + 2 m n), steps (b, h, w, k m) or (b, h, w, k 2 m) -> (b, h, w, d), float32 or wider."""
        h, w = x.shape[1:3]
        wide = torch.promote_types(self.out_proj.weight.dtype, torch.float32)
        routes = self.scan.split(x).to(wide).split(self.widths, -1)
        v, q, k = (t.unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in routes)  # (b, k, m, l, n or p)
        steps = self.scan.split_each(steps.unflatten(-1, (self.scan.count, -1))).to(wide)
        beta, *rest = steps.mT.split(self.heads, 2)  # (b, k, m, l)
        g = None
        if self.A_log is not None and self.dt_bias is not None:
            A, bias = self.A_log.to(wide).exp(), self.dt_bias.to(wide)
            g = -A[..., None] * F.softplus(rest[0] + bias[..., None])
        y = delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta.sigmoid(), g)
        return self.scan.merge(cast(Tensor, y).transpose(2, 3).flatten(3), h, w)

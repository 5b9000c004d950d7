"""Multi-head scan: subspaces of the channels read in different orders (MHS-VM, arXiv:2406.05992).

Original code: PixDeep/MHS-VM, Apache-2.0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.block import Conv2d
from vmamba.kernels.routes import merge
from vmamba.kernels.selective_scan import route_scan
from vmamba.mixers.selective import SelectiveScans
from vmamba.norm import LayerNorm
from vmamba.scans import Scan, cross


def straight(h: int, w: int) -> Tensor:
    """(4, h * w): rows, the same backwards, columns, the same backwards: ``cross`` in the order of the other heads."""
    return cross.routes(h, w)[[0, 2, 1, 3]]


THREE_HEADS = ("serpentine", "zigzag", "spiral")
FOUR_HEADS = (*THREE_HEADS, straight)


def route_attention(y: Tensor, threshold: float = 0.0) -> Tensor:
    """(..., k, d) -> (..., d): the sum over k routes, times how much they differ beyond ``threshold``.

    They differ by std / (mean - min), where std is unbiased ("scan route attention"): for four routes between 2/3 and
    2 whatever they hold, and 0 where all agree; the gradient of std, which is not defined there, is then 0 as well. A
    single route has nothing to differ from and is passed on.
    """
    if y.shape[-2] == 1:
        return y.squeeze(-2)
    variance = y.var(-2)
    differ = variance > 0
    std = torch.where(differ, variance, 1).sqrt() * differ
    spread = (y - y.amin(-2, keepdim=True)).mean(-2)
    return y.sum(-2) * F.relu(std / (spread + 1e-5) - threshold)


class ScanHead(SelectiveScans):
    """One head: selective scans of (b, h, w, d) along k routes, kept apart: (b, h, w, k, d), float32 or wider.

    Args:
        dim: channels d of the head's subspace.
        state: states n per channel.
        scan: a scan's name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.
        device, dtype: of the parameters.
    """

    def __init__(self, dim: int, *, state: int = 16, scan: "str | Callable" = "serpentine", device=None, dtype=None):
        super().__init__()
        self.scan, rank = Scan(scan), math.ceil(dim / 16)
        self.make_scans(dim, routes=self.scan.count, state=state, rank=rank, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, k, d)"""
        h, w = x.shape[1:3]
        lines = self.scan.split_each(self.project(x))  # (b, k, l, r + 2n)
        dt, B, C = lines.split([self.rank, self.state, self.state], -1)
        delta = dt @ self.dt_proj.to(dt.dtype).mT
        u = self.scan.split(x)
        y = route_scan(u, delta, self.decay(), B, C, self.D, delta_bias=self.dt_bias, delta_softplus=True)
        return merge(y, self.scan.table(h, w, x.device, per_route=True)).unflatten(1, (h, w, -1))


@register_notrace_module
class MHS(nn.Module):
    """(b, h, w, c) -> (b, h, w, c): every head scans its own subspace of the channels; the result is gated.

    Args:
        dim: channels c; n heads have floor(c / n) channels each.
        scan: the scan of each head, as for :class:`vmamba.scans.Scan`; one that is not in a list makes one head.
        state: states per channel.
        threshold: t of :func:`route_attention`. It is not stored with weights: the published ISIC18 weights are used
            with 0.4 and were trained with 0.5, those of ISIC17 with 0. Below 2/3 it only scales.
        conv: size of the depthwise convolution.
        device, dtype: of the parameters.

    Raises:
        ValueError: fewer channels than heads.

    Example:
        >>> VMamba(depths=(2, 2, 2, 2), dim=96, mixer=MHS, scan=FOUR_HEADS)
    """

    def __init__(
        self,
        dim: int,
        *,
        scan: "str | Callable | Sequence[str | Callable]" = FOUR_HEADS,
        state: int = 16,
        threshold: float = 0.0,
        conv: int = 3,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        scans = [scan] if isinstance(scan, str) or not isinstance(scan, Sequence) else scan
        width = dim // len(scans)
        if width < 1:
            raise ValueError(f"{dim} channels cannot be shared by {len(scans)} heads; give at least one to each")
        self.threshold = threshold
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.conv = Conv2d(dim, dim, conv, padding=conv // 2, groups=dim, **dd)
        self.split = nn.Linear(dim, width * len(scans), bias=False, **dd)
        self.heads = nn.ModuleList(ScanHead(width, state=state, scan=each, **dd) for each in scans)
        self.heads_norm = LayerNorm(width * len(scans), **dd)
        self.join = nn.Linear(width * len(scans), dim, bias=False, **dd)
        self.norm = LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        x, z = self.in_proj(x).chunk(2, -1)
        parts = self.split(F.silu(self.conv(x))).chunk(len(self.heads), -1)
        heads = [route_attention(head(part), self.threshold) for head, part in zip(self.heads, parts, strict=True)]
        y = self.join(self.heads_norm(torch.cat(heads, -1).to(self.join.weight.dtype)))
        return self.norm(y) * F.silu(z)


# official name -> ours, for a mixer at any place in a network; the second copies that checkpoints hold are left out
KEYS = [
    (r"^.*mhs\.(?:x_ssproj\.weight|scanhead_\w\.scanning\..*)$", ""),
    (r"\bconv2d\.", "conv."),
    (r"\bout_norm\.", "norm."),
    (r"mhs\.x_ssproj_W$", "split.weight"),
    (r"mhs\.cat_norm\.", "heads_norm."),
    (r"mhs\.y_proj\.", "join."),
    (r"mhs\.scanhead_(\w)\.mambaeng\.", lambda m: f"heads.{'CXSZ'.index(m[1])}."),
    (r"(heads\.\d)\.x_proj_weight$", r"\1.x_proj"),
    (r"(heads\.\d)\.dt_projs_weight$", r"\1.dt_proj"),
    (r"(heads\.\d)\.dt_projs_bias$", r"\1.dt_bias"),
    (r"(heads\.\d)\.A_logs$", r"\1.A_log"),
    (r"(heads\.\d)\.Ds$", r"\1.D"),
]

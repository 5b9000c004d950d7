"""MambaVision's mixer: a scanned half and a convolved half, side by side (arXiv:2407.08083, section 3.2)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.mixers.selective import SelectiveScans
from vmamba.scans import Scan


class LineConv(nn.Conv1d):
    """A depthwise filter over a pixel and its neighbours in reading order, (b, h, w, c) -> (b, h, w, c).

    The end of a row and the start of the next are neighbours, as the original has it.

    Args:
        channels: c.
        size: odd width of the filter.
        device, dtype: of the parameters.
    """

    def __init__(self, channels: int, size: int, *, device=None, dtype=None):
        super().__init__(
            channels, channels, size, padding=size // 2, groups=channels, bias=False, device=device, dtype=dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return super().forward(input.flatten(1, 2).mT).mT.unflatten(1, input.shape[1:3])


@register_notrace_module
class MambaVisionMixer(SelectiveScans):
    """(b, h, w, c) -> (b, h, w, c): out_proj([scan(x) | z]) with [x | z] = silu(conv(in_proj(input))), cut in halves.

    Args:
        dim: channels c, an even number; the scans run on d = c / 2 channels.
        state: states n per channel.
        rank: rank r of the projection that delta goes through; ceil(c / 16) by default.
        conv: odd size of the convolution along the rows.
        scan: a scan's name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``; routes are summed.
        device, dtype: of the parameters.

    Raises:
        ValueError: the number of channels is odd.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 8,
        rank: int | None = None,
        conv: int = 3,
        scan: "str | Callable" = "raster",
        device=None,
        dtype=None,
    ):
        if dim % 2:
            raise ValueError(f"half of the channels is scanned, so their number must be even, got {dim}")
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scan = Scan(scan)
        self.in_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.conv = LineConv(dim, conv, **dd)
        self.make_scans(dim // 2, routes=self.scan.count, state=state, rank=rank or math.ceil(dim / 16), **dd)
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)

    def step_bias(self, group: slice | None = None) -> Tensor:
        """Twice ``dt_bias``: the original adds it in the projection, and once more in the scan."""
        return 2 * super().step_bias(group)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        x, z = F.silu(self.conv(self.in_proj(x))).chunk(2, -1)
        y = self.scan_along(x, self.scan)
        return self.out_proj(torch.cat([y.to(z.dtype), z], -1))

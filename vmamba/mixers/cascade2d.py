"""Cascade2D: selective scans along each row, then along each column (VMamba's ablation, arXiv:2401.10166)."""

from collections.abc import Callable

from timm.models import register_notrace_module
from torch import Tensor
from torch.nn import functional as F

from vmamba.mixers.selective import SelectiveMixer
from vmamba.scans import Scan


@register_notrace_module
class Cascade2D(SelectiveMixer):
    """Two passes: each row is scanned as a map of its own, and then each column of the result.

    A LayerNorm without weights comes before each pass. The original code adds what is read from the right, step by
    step, to what is read from the left, so that the sum mixes pixels; here results return to their pixels.

    Args:
        dim: channels c.
        scan: the order within a row or column, on maps of one pixel's height; k routes for each of the two passes.
        **selective: ``state``, ``expand``, ``rank`` of :class:`SelectiveMixer`, and all that it passes on to
            :class:`vmamba.mixers.gated.GatedMixer`.
    """

    def __init__(self, dim: int, *, scan: "str | Callable" = "bidirectional", **selective):
        order = Scan(scan)
        super().__init__(dim, routes=2 * order.count, **selective)
        self.scan = order

    def scan_map(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d) in float32 (float64 for float64)."""
        k = self.scan.count
        rows = self.scan_rows(x, slice(0, k)).to(x.dtype)
        return self.scan_rows(rows.transpose(1, 2), slice(k, 2 * k)).transpose(1, 2)

    def scan_rows(self, x: Tensor, group: slice) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d), along each row, with the parameters of the routes ``group``."""
        rows = F.layer_norm(x, x.shape[-1:]).flatten(0, 1)[:, None]  # (b * h, 1, w, d)
        return self.scan_along(rows, self.scan, group).view_as(x)

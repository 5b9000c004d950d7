"""SS2D: selective scans along the routes of a 2D scan (VMamba, arXiv:2401.10166, section 4.2 and appendix A)."""

from collections.abc import Callable

from timm.models import register_notrace_module
from torch import Tensor

from vmamba.mixers.selective import SelectiveMixer
from vmamba.scans import Scan


@register_notrace_module
class SS2D(SelectiveMixer):
    """Per route: delta, B and C are linear in the pixel, the recurrence runs along the route, all routes are summed.

    With ``scan="atrous"`` this is ES2D of EfficientVMamba (arXiv:2403.09977).

    Args:
        dim: channels c; the scan runs on d = expand * c channels.
        state: states n per channel.
        expand: d / c.
        rank: rank r of the projection that delta goes through; ceil(c / 16) by default.
        scan: a scan's name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.
        **gated: ``conv``, ``conv_bias``, ``gate``, ``act``, ``norm``, ``linear``, ``device``, ``dtype`` of
            :class:`vmamba.mixers.gated.GatedMixer`.
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
        order = Scan(scan)
        super().__init__(dim, routes=order.count, state=state, expand=expand, rank=rank, **gated)
        self.scan = order

    def scan_weights(self) -> tuple[Tensor, ...]:
        """``x_proj``."""
        return (self.x_proj,)

    def scan_map(self, x: Tensor, x_proj: Tensor | None = None) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d) in float32 (float64 for float64); ``x_proj``: (k, r + 2n, d), cast already."""
        return self.scan_along(x, self.scan, x_proj=x_proj)

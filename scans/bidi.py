"""Four routes, two row by row and two backwards: the ablation without columns (VMamba, arXiv:2401.10166, "bidi-scan")."""

from torch import Tensor

from vmamba.scans import bidirectional


def routes(h: int, w: int) -> Tensor:
    """(4, h * w)"""
    return bidirectional.routes(h, w).repeat_interleave(2, 0)

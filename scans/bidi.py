"""Four routes, two row by row and two backwards: without columns (VMamba's ablation "bidi-scan", arXiv:2401.10166)."""

from torch import Tensor

from vmamba.scans import bidirectional


def routes(h: int, w: int) -> Tensor:
    """(4, h * w)"""
    return bidirectional.routes(h, w).repeat_interleave(2, 0)

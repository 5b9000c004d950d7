"""Four routes, all row by row: the ablation without directions (VMamba, arXiv:2401.10166, "unidi-scan")."""

from torch import Tensor

from vmamba.scans import raster


def routes(h: int, w: int) -> Tensor:
    """(4, h * w)"""
    return raster.routes(h, w).repeat(4, 1)

"""Window by window, and row by row within each; the same by columns; both backwards: four routes.

LocalMamba (arXiv:2403.09338) has windows of 2 and of 7. The last window of a row or column may be narrower.
"""

import torch
from torch import Tensor


def routes(h: int, w: int, window: int = 2) -> Tensor:
    """(4, h * w)"""
    grid = torch.arange(h * w).view(h, w)
    rows, columns = (
        torch.cat([part.flatten() for band in map.split(window) for part in band.split(window, 1)])
        for map in (grid, grid.T)
    )
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])

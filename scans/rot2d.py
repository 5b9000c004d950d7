"""Row by row over the map turned by 0, 90, 180 and 270 degrees: four routes (VMamba's single-file release)."""

import torch
from torch import Tensor


def routes(h: int, w: int) -> Tensor:
    """(4, h * w)"""
    grid = torch.arange(h * w).view(h, w)
    return torch.stack([torch.rot90(grid, turn).flatten() for turn in range(4)])

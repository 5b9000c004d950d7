"""Rows, columns, and both backwards: four routes (VMamba, arXiv:2401.10166, figure 3)."""

import torch
from torch import Tensor


def routes(h: int, w: int) -> Tensor:
    """(4, h * w)"""
    grid = torch.arange(h * w).view(h, w)
    rows, columns = grid.flatten(), grid.T.flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])

"""Row by row, forwards and backwards: two routes (Vision Mamba, arXiv:2401.09417, figure 2)."""

import math

import torch
from torch import Tensor


def routes(*grid: int) -> Tensor:
    """(2, l), l pixels; volumes are read slice by slice"""
    rows = torch.arange(math.prod(grid))
    return torch.stack([rows, rows.flip(0)])

"""Row by row, forwards and backwards: two routes (Vision Mamba, arXiv:2401.09417, figure 2)."""

import torch
from torch import Tensor


def routes(h: int, w: int) -> Tensor:
    """(2, h * w)"""
    rows = torch.arange(h * w)
    return torch.stack([rows, rows.flip(0)])

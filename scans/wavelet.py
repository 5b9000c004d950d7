"""From the coarsest subband of a wavelet transform to the finest, and backwards: two routes.

For tokens laid out as a Haar transform (Mallat, 1989): low frequencies in the upper left quarter, which is divided in
the same way again and again. The order is that of Shapiro's zerotree coder (1993): the coarsest low band, then at each
level the quarters upper right, lower left, lower right, each row by row. DiMSUM (arXiv:2411.04168) too reads wavelet
tokens from low to high frequencies.
"""

import torch
from torch import Tensor


def routes(h: int, w: int) -> Tensor:
    """(2, h * w)"""
    order = _coarse_to_fine(torch.arange(h * w).view(h, w))
    return torch.stack([order, order.flip(0)])


def _coarse_to_fine(grid: Tensor) -> Tensor:
    h, w = grid.shape
    if h * w <= 1:
        return grid.flatten()
    low, left = (h + 1) // 2, (w + 1) // 2
    bands = grid[:low, left:], grid[low:, :left], grid[low:, left:]
    return torch.cat([_coarse_to_fine(grid[:low, :left]), *(band.flatten() for band in bands)])

"""Diagonals, all read downwards: the oblique directions that row and column scans lack; four routes.

Unlike ``zigzag``, which turns at the end of each diagonal, every diagonal here is read in the same direction.
"""

import torch
from torch import Tensor


def routes(h: int, w: int) -> Tensor:
    """(4, h * w): diagonals from the top left, the same backwards, from the top right, the same backwards."""
    grid = torch.arange(h * w).view(h, w)
    y, x = torch.arange(h)[:, None], torch.arange(w)
    order = ((y + x) * (h + w) + y).flatten().argsort()
    left, right = grid.flatten()[order], grid.flip(1).flatten()[order]
    return torch.stack([left, left.flip(0), right, right.flip(0)])

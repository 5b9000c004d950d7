"""Every second pixel: four routes, one over each parity of row and column (EfficientVMamba, arXiv:2403.09977, ES2D).

Together they visit each pixel once. Odd sides are padded with zeros to even ones, so all routes are equally long.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def routes(h: int, w: int) -> Tensor:
    """(4, ceil(h / 2) * ceil(w / 2)): even rows row by row, odd rows column by column; even columns, then odd ones."""
    grid = F.pad(torch.arange(h * w).view(h, w), (0, w % 2, 0, h % 2), value=h * w)
    order = grid[::2, ::2], grid[1::2, ::2].T, grid[::2, 1::2], grid[1::2, 1::2].T
    return torch.stack([part.flatten() for part in order])

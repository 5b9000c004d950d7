"""Snakes along rows and along columns, each also backwards: four routes (PlainMamba, arXiv:2403.17695, section 3).

In a volume the snakes go through it slice by slice, along its last side and along its first one; every step goes to a
neighbour there too.
"""

import math

import torch
from torch import Tensor


def routes(*grid: int) -> Tensor:
    """(4, l), l pixels: rows from the top left, the same backwards, columns from the top left, the same backwards."""
    pixels = torch.arange(math.prod(grid)).view(grid)
    rows, columns = _snake(pixels), _snake(pixels.permute(*range(pixels.ndim)[::-1]))
    return torch.stack([rows, rows.flip(0), columns, columns.flip(0)])


def _snake(pixels: Tensor) -> Tensor:
    """The entries of ``pixels`` part by part of the first side, every second part backwards."""
    if pixels.ndim == 1:
        return pixels
    parts = torch.stack([_snake(part) for part in pixels])
    odd = torch.arange(len(parts))[:, None] % 2 == 1
    return torch.where(odd, parts.flip(1), parts).flatten()

"""Spirals from the border to the middle, and back: four routes (MHS-VM, arXiv:2406.05992, head S)."""

import torch
from torch import Tensor


def routes(h: int, w: int) -> Tensor:
    """(4, h * w): clockwise from the top left, the same backwards, anticlockwise from the bottom left, backwards."""
    grid = torch.arange(h * w).view(h, w)
    down, up = _peel(grid), _peel(grid.flip(0))
    return torch.stack([down, down.flip(0), up, up.flip(0)])


def _peel(grid: Tensor) -> Tensor:
    """The entries of ``grid`` along the inward clockwise spiral: take the top row, turn the rest, and again."""
    turns = []
    while grid.numel():
        turns.append(grid[0])
        grid = grid[1:].rot90()
    return torch.cat(turns)

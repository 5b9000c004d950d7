"""The zigzag of JPEG (ITU-T T.81): diagonals from corner to corner, each against the one before; four routes."""

import torch
from torch import Tensor


def routes(h: int, w: int) -> Tensor:
    """(4, h * w): from the top left, the same backwards, from the top right, the same backwards (MHS-VM's head X)."""
    grid = torch.arange(h * w).view(h, w)
    y, x = torch.arange(h)[:, None], torch.arange(w)
    upwards = (y + x) % 2 == 0
    order = ((y + x) * (h + w) + torch.where(upwards, x, y)).flatten().argsort()
    left, right = grid.flatten()[order], grid.flip(1).flatten()[order]
    return torch.stack([left, left.flip(0), right, right.flip(0)])

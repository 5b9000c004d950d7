"""Three routes as a single one: rows backwards, columns, columns backwards (MSVMamba, arXiv:2405.14174, coarse maps).

The state runs on from one part to the next, and every pixel is visited three times.
"""

import torch
from torch import Tensor


def routes(h: int, w: int) -> Tensor:
    """(1, 3 * h * w)"""
    grid = torch.arange(h * w).view(h, w)
    rows, columns = grid.flatten(), grid.T.flatten()
    return torch.cat([rows.flip(0), columns, columns.flip(0)])[None]

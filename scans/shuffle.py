"""Pixels in random order, the same for every map of a size, and backwards: two routes (MambaMIM, arXiv:2408.08070)."""

import numpy as np
import torch
from torch import Tensor


def routes(h: int, w: int, seed: int = 0) -> Tensor:
    """(2, h * w)"""
    order = np.random.RandomState(seed).permutation(h * w)  # NumPy keeps the numbers of this generator for ever
    return torch.as_tensor(np.stack([order, order[::-1]]))

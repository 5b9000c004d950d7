"""The Hilbert curve of any rectangle, begun along the rows or the columns, and both backwards: four routes.

Hilbert and transposed Hilbert curve are the routes of PointMamba (arXiv:2402.10739); on images FractalMamba
(arXiv:2405.14480). Rectangles are divided as in J. Cerveny's generalised curve: every step goes to a neighbour, but for
one diagonal step along an odd side of a rectangle whose other side is even, where no other way joins the two corners.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def routes(h: int, w: int) -> Tensor:
    """(4, h * w)"""
    along_rows, along_columns = curve(w, h) @ (1, w), curve(h, w) @ (w, 1)
    return torch.as_tensor(np.stack([along_rows, along_columns, along_rows[::-1], along_columns[::-1]]))


@lru_cache(maxsize=256)
def curve(w: int, h: int) -> NDArray[np.int64]:
    """(w * h, 2), the pixels (x, y) in their order from (0, 0) to (w - 1, 0)."""
    if min(w, h) == 1:
        return np.indices((w, h)).reshape(2, -1).T
    left, low = w // 2, h // 2
    if 2 * w > 3 * h:  # two parts side by side
        left += left % 2 * (w > 2)
        return np.concatenate([curve(left, h), np.add(curve(w - left, h), (left, 0))])
    low += low % 2 * (h > 2)  # up in the left part, across the far part, back in the right part
    up, down = curve(low, left)[:, ::-1], curve(low, w - left)[:, ::-1]
    across = np.add(curve(w, h - low), (0, low))
    return np.concatenate([up, across, np.subtract((w - 1, low - 1), down)])

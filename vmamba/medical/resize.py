"""Slices to the size a network is trained at, as the 2D papers do it, and its maps back to the size of the slices."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import zoom

Size = Sequence[int]


class Resizer(NamedTuple):
    """``image`` takes (s, c, h, w) float32, ``label`` classes (s, h, w); both give the last two axes the ``size``."""

    words: str
    image: Callable[[np.ndarray, Size], np.ndarray]
    label: Callable[[np.ndarray, Size], np.ndarray]


def _cubic(stack: np.ndarray, size: Size) -> np.ndarray:
    if stack.shape[-2:] == tuple(size):
        return stack
    flat = stack.reshape(-1, *stack.shape[-2:])
    return np.stack([_zoom(x, size, 3) for x in flat]).reshape(*stack.shape[:-2], *size)


def nearest(stack: np.ndarray, size: Size) -> np.ndarray:
    """(..., h, w) -> (..., *size): what scipy's ``zoom`` of order 0 picks, corners on corners."""
    rows, columns = (_zoom(np.arange(old), [new], 0) for old, new in zip(stack.shape[-2:], size, strict=True))
    return stack if stack.shape[-2:] == tuple(size) else stack[..., rows[:, None], columns]


def _zoom(x: np.ndarray, size: Size, order: int) -> np.ndarray:
    return np.asarray(zoom(x, [new / old for new, old in zip(size, x.shape, strict=True)], order=order))


def _bilinear(stack: np.ndarray, size: Size) -> np.ndarray:
    x = torch.from_numpy(stack)
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False, antialias=False).numpy()


def _half(label: np.ndarray, size: Size) -> np.ndarray:
    """Of two classes: where the resized mask is at least one half."""
    return (_bilinear(label[:, None].astype(np.float32), size)[:, 0] >= 0.5).astype(label.dtype)


RESIZERS = {
    "zoom": Resizer("scipy's zoom, order 3 in and 0 out", _cubic, nearest),
    "bilinear": Resizer("bilinear, masks cut at 0.5, nearest out", _bilinear, _half),
}

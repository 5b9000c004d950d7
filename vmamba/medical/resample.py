"""Resampling by nnU-Net's rule: splines, but the nearest slice along an axis that is far coarser than the others."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from scipy.ndimage import zoom
from torch import Tensor

ANISOTROPIC = 3.0
TIE = 1e-9


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """The size of the same volume in voxels of ``target``."""
    return tuple(round(n * a / b) for n, a, b in zip(shape, spacing, target, strict=True))


def coarse_axis(*spacings: Sequence[float]) -> int | None:
    """The axis that is resampled apart: the one coarsest of the first spacing of more than 3 to 1, if it is one."""
    for spacing in spacings:
        if max(spacing) / min(spacing) > ANISOTROPIC:
            coarsest = [i for i, s in enumerate(spacing) if s == max(spacing)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def resample(maps: np.ndarray, shape: Sequence[int], coarse: int | None, order: int) -> np.ndarray:
    """Each map of (c, z, y, x) to ``shape`` by splines of ``order``; order 0 along the axis ``coarse``."""
    if maps.shape[1:] == tuple(shape):
        return maps
    return np.stack([_one(m, shape, coarse, order) for m in maps]).astype(maps.dtype)


def resample_maps(maps: Tensor, shape: Sequence[int], coarse: int | None) -> Tensor:
    """:func:`resample` of order 1 where the maps (c, z, y, x) lie, so that a GPU does it."""
    if tuple(maps.shape[1:]) == tuple(shape):
        return maps
    if coarse is None:
        return F.interpolate(maps[None], tuple(shape), mode="trilinear")[0]
    slices = maps.movedim(coarse + 1, 0)  # (n, c, *plane)
    slices = F.interpolate(slices, tuple(_without(shape, coarse)), mode="bilinear").movedim(0, coarse + 1)
    return F.interpolate(slices[None], tuple(shape), mode="nearest-exact")[0]


def resample_labels(label: np.ndarray, shape: Sequence[int], coarse: int | None) -> np.ndarray:
    """(z, y, x) label values to ``shape``: each value's mask linearly, and the largest wins; the nearest in a tie."""
    if label.shape == tuple(shape):
        return label
    nearest = _one(label, shape, coarse, 0)
    best, out = np.full(shape, -np.inf), np.zeros(shape, label.dtype)
    for value in np.unique(label):
        score = _one((label == value).astype(np.float64), shape, coarse, 1) + TIE * (nearest == value)
        out[score > best] = value
        best = np.maximum(best, score)
    return out


def _one(volume: np.ndarray, shape: Sequence[int], coarse: int | None, order: int) -> np.ndarray:
    if coarse is None:
        return _zoom(volume, shape, order)
    flat = [volume.shape[i] if i == coarse else n for i, n in enumerate(shape)]
    slices = [_zoom(s, _without(flat, coarse), order) for s in np.moveaxis(volume, coarse, 0)]
    return _zoom(np.stack(slices, coarse), shape, 0)


def _without(shape: Sequence[int], axis: int) -> list[int]:
    return [n for i, n in enumerate(shape) if i != axis]


def _zoom(volume: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    factors = [n / m for n, m in zip(shape, volume.shape, strict=True)]
    if all(f == 1 for f in factors):
        return volume
    out = np.asarray(zoom(volume, factors, order=order, mode="nearest", grid_mode=True))
    return np.clip(out, volume.min(), volume.max())

"""Normalisation, padding, and augmentation (MONAI's transforms, seeded for each sample)."""

from collections.abc import Callable

import numpy as np
import torch.nn.functional as F
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import RandSpatialCropd
from monai.transforms.intensity.dictionary import RandAdjustContrastd, RandGaussianNoised, RandScaleIntensityd
from monai.transforms.spatial.dictionary import RandAffined, RandFlipd
from torch import Tensor

from vmamba.medical.drawn import transformed
from vmamba.medical.recipe_augment import RECIPE_AUGMENTATIONS

_KEYS = ("image", "label")
_WARP = {"mode": ("bilinear", "nearest"), "padding_mode": "border"}
MULTIPLE = 32


def _zscore(x: np.ndarray) -> np.ndarray:
    """Mean 0, deviation 1 over the values that are not 0, so that empty surroundings do not matter."""
    inside = x != 0
    count = np.maximum(inside.sum(axis=(0, 2, 3), keepdims=True), 1)
    mean = x.sum(axis=(0, 2, 3), keepdims=True, dtype=np.float64) / count
    variance = np.square(x - mean).sum(axis=(0, 2, 3), keepdims=True, where=inside) / count
    return (x - mean) / np.maximum(np.sqrt(variance), 1e-8)


def _minmax(x: np.ndarray) -> np.ndarray:
    low, high = x.min(axis=(0, 2, 3), keepdims=True), x.max(axis=(0, 2, 3), keepdims=True)
    return (x - low) / np.maximum(high - low, 1e-8)


def _range255(x: np.ndarray) -> np.ndarray:
    """0 to 255 over all channels of a slice together."""
    low, high = x.min(axis=(1, 2, 3), keepdims=True), x.max(axis=(1, 2, 3), keepdims=True)
    return 255 * (x - low) / np.maximum(high - low, 1e-8)


NORMALISATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zscore": _zscore,
    "minmax": _minmax,
    "dataset": lambda x: x,  # then shifted and scaled by the training set's statistics
    "none": lambda x: x,
    "centred": lambda x: 2 * x - 1,  # of values from 0 to 1
    "range255": _range255,
}

AUGMENTATIONS: dict[str, Callable[[], list]] = {
    "none": list,
    "mirror": lambda: [RandFlipd(_KEYS, prob=0.5, spatial_axis=0), RandFlipd(_KEYS, prob=0.5, spatial_axis=1)],
    "standard": lambda: [
        RandAffined(_KEYS, prob=0.5, rotate_range=0.35, scale_range=0.15, translate_range=8, **_WARP),
        *AUGMENTATIONS["mirror"](),
        RandAdjustContrastd("image", prob=0.2, gamma=(0.7, 1.5)),
        RandScaleIntensityd("image", prob=0.2, factors=0.2),
        RandGaussianNoised("image", prob=0.15, std=0.1),
    ],
    **RECIPE_AUGMENTATIONS,
}


def normalise(stack: np.ndarray, how: str, statistics: list[list[float]] | None = None) -> np.ndarray:
    """A case's slices (s, c, h, w), each channel normalised over the case or by (means, deviations), as float32."""
    x = NORMALISATIONS[how](stack)
    if statistics:
        mean, std = (np.asarray(values, np.float32)[:, None, None] for values in statistics)
        x = (x - mean) / std
    return x.astype(np.float32)


def dataset_statistics(stacks: list[np.ndarray]) -> list[list[float]]:
    """(means, deviations) of each channel over all values of all stacks (s, c, h, w) that are not 0."""
    means, deviations = [], []
    for channel in range(stacks[0].shape[1]):
        values = np.concatenate([x[:, channel][x[:, channel] != 0] for x in stacks])
        means.append(float(values.mean(dtype=np.float64)) if values.size else 0.0)
        deviations.append(max(float(values.std(dtype=np.float64)), 1e-8) if values.size else 1.0)
    return [means, deviations]


def pad_to(x: Tensor, size: tuple[int, int], value: float | None = None) -> tuple[Tensor, tuple[slice, slice]]:
    """``x`` (..., h, w) centred in at least ``size``, and the slices that cut it out again.

    Padded with ``value``, by default with each map's smallest, which is the raw zero around a scan after normalisation.
    """
    h, w = x.shape[-2:]
    extra = max(size[0] - h, 0), max(size[1] - w, 0)
    top, left = extra[0] // 2, extra[1] // 2
    inside = slice(top, top + h), slice(left, left + w)
    if not any(extra):
        return x, inside
    floor = x.amin((-2, -1), keepdim=True) if value is None else value
    return F.pad(x - floor, (left, extra[1] - left, top, extra[0] - top)) + floor, inside


def divisible(h: int, w: int) -> tuple[int, int]:
    """The next size whose sides the network's strides divide: multiples of 32."""
    return -(-h // MULTIPLE) * MULTIPLE, -(-w // MULTIPLE) * MULTIPLE


class Augment:
    """(image (c, h, w), label (h, w)) -> a patch of both, the same for the same seed."""

    def __init__(self, patch: tuple[int, int], augmentation: str) -> None:
        self.patch = patch
        crop = RandSpatialCropd(_KEYS, roi_size=patch, random_size=False)
        self.transform = Compose([crop, *AUGMENTATIONS[augmentation]()])

    def __call__(self, image: Tensor, label: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Pads to the patch, crops it at random, augments; ``seed`` decides every draw."""
        padded, _ = pad_to(image, self.patch)
        mask, _ = pad_to(label[None].float(), self.patch, value=0)
        sample = transformed(self.transform, {"image": padded, "label": mask}, seed)
        return sample["image"].float(), sample["label"][0].long()

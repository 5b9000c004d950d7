"""nnU-Net's data set fingerprint: spacings, sizes without the empty border, intensities of the foreground."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.ndimage import binary_fill_holes, find_objects
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.cases import Case
from vmamba.medical.raw import RawDataset
from vmamba.medical.several import in_order
from vmamba.medical.volume import read_case

SAMPLES = 100_000_000  # foreground voxels in all; nnU-Net's figure
LEAST = 10_000  # a case's values are repeated up to so many at least


@dataclass(frozen=True)
class Found:
    """What a case adds: spacing, size without the empty border, its share of all voxels, foreground by channel."""

    spacing: list[float]
    shape: list[int]
    share: float
    foreground: list[np.ndarray]


def fingerprint(dataset: RawDataset, progress: bool = True, threads: int = 1) -> dict[str, Any]:
    """Reads every case (and so checks it), ``threads`` at a time; returns what dataset_fingerprint.json holds."""
    cases = dataset.cases()
    read = partial(_case, dataset, SAMPLES // len(cases))
    bar = tqdm(in_order(read, cases, threads), "fingerprint", len(cases), unit="case", disable=not progress)
    found = list(bar)
    filled = [one for one in found if one.foreground[0].size]
    if not filled:
        raise UserError(f"{dataset.folder / 'labelsTr'}: every label is empty; expected some foreground")
    channels = zip(*(one.foreground for one in filled), strict=True)
    return {
        "spacings": [one.spacing for one in found],
        "shapes_after_crop": [one.shape for one in found],
        "foreground_intensity_properties_per_channel": {
            str(i): _statistics(_evenly(values)) for i, values in enumerate(channels)
        },
        "median_relative_size_after_cropping": float(np.median([one.share for one in found])),
    }


def _case(dataset: RawDataset, most: int, case: Case) -> Found:
    """Of each channel's foreground at most ``most`` values."""
    image, label = read_case(case, len(dataset.channels), dataset.labels)
    assert label is not None
    box = inside(image.data)[1]
    shape = [s.stop - s.start for s in box]
    voxels = (label[box] > 0).nonzero()
    step = max(-(-voxels[0].size // most), 1)
    drawn = tuple(places[::step] for places in voxels)
    foreground = [channel[box][drawn] for channel in image.data]
    return Found(list(image.spacing), shape, float(np.prod(shape) / label.size), foreground)


def inside(image: np.ndarray) -> tuple[np.ndarray, tuple[slice, ...]]:
    """(z, y, x) bool: where any channel of (c, z, y, x) is not 0, holes filled; and the box around it."""
    mask = binary_fill_holes((image != 0).any(0))
    assert mask is not None
    box = find_objects(mask.astype(np.uint8))
    return mask, box[0] if box else tuple(slice(0, n) for n in mask.shape)  # an image of zeros stays whole


def _evenly(cases: Sequence[np.ndarray]) -> np.ndarray:
    """As many values of each case, so that all count alike: repeated evenly up to the largest case's number."""
    count = max(LEAST, *(len(values) for values in cases))
    return np.concatenate([values[np.arange(count) * len(values) // count] for values in cases])


def _statistics(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    return {
        "mean": float(values.mean(dtype=np.float64)),
        "median": float(median),
        "std": float(values.std(dtype=np.float64)),
        "min": float(values.min()),
        "max": float(values.max()),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }

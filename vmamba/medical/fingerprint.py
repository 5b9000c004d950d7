"""nnU-Net's data set fingerprint: spacings, sizes without the empty border, intensities of the foreground."""

from typing import Any

import numpy as np
from scipy.ndimage import binary_fill_holes, find_objects
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.raw import RawDataset
from vmamba.medical.volume import read_case

SAMPLES = 100_000_000  # foreground voxels in all; nnU-Net's figure
LEAST = 10_000  # a case's values are repeated up to so many at least


def fingerprint(dataset: RawDataset, progress: bool = True) -> dict[str, Any]:
    """Reads every case (and so checks it) and returns what dataset_fingerprint.json holds."""
    cases = dataset.cases()
    per_case = SAMPLES // len(cases)
    spacings, shapes, shares = [], [], []
    intensities: list[list[np.ndarray]] = [[] for _ in dataset.channels]
    for case in tqdm(cases, desc="fingerprint", unit="case", disable=not progress):
        image, label = read_case(case, len(dataset.channels), dataset.labels)
        assert label is not None
        box = inside(image.data)[1]
        spacings.append(list(image.spacing))
        shapes.append([s.stop - s.start for s in box])
        shares.append(float(np.prod(shapes[-1]) / label.size))
        foreground = (label[box] > 0).nonzero()
        for values, channel in zip(intensities, image.data, strict=True):
            found = channel[box][foreground]
            if found.size:
                values.append(found if found.size <= per_case else found[:: -(-found.size // per_case)])
    if not intensities[0]:
        raise UserError(f"{dataset.folder / 'labelsTr'}: every label is empty; expected some foreground")
    return {
        "spacings": spacings,
        "shapes_after_crop": shapes,
        "foreground_intensity_properties_per_channel": {
            str(i): _statistics(_evenly(values)) for i, values in enumerate(intensities)
        },
        "median_relative_size_after_cropping": float(np.median(shares)),
    }


def inside(image: np.ndarray) -> tuple[np.ndarray, tuple[slice, ...]]:
    """(z, y, x) bool: where any channel of (c, z, y, x) is not 0, holes filled; and the box around it."""
    mask = binary_fill_holes((image != 0).any(0))
    assert mask is not None
    box = find_objects(mask.astype(np.uint8))
    return mask, box[0] if box else tuple(slice(0, n) for n in mask.shape)  # an image of zeros stays whole


def _evenly(cases: list[np.ndarray]) -> np.ndarray:
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

"""Tiny data sets for the tests of medseg: a bright disc to find, as RGB pictures or as oblique NIfTI volumes."""

from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

AFFINE = np.array([[0, -1.5, 0, 10], [2, 0, 0, -5], [0, 0, 3, 7], [0, 0, 0, 1.0]])
TINY = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "depths_decoder": [1, 1, 1, 1], "drop_path_rate": 0.2}


def disc(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """(h, w) bool: a disc somewhere inside."""
    y, x = np.mgrid[:h, :w]
    cy, cx = rng.uniform(0.35, 0.65, 2) * (h, w)
    return (y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(5, 9) ** 2


def pictures(folder: Path, count: int = 5, size: tuple[int, int] = (28, 36)) -> Path:
    """RGB PNGs in images/ and 0/255 masks in labels/."""
    rng = np.random.default_rng(0)
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    for i in range(count):
        mask = disc(rng, *size)
        grey = np.clip(60 + 120 * mask + rng.normal(0, 15, size), 0, 255)
        Image.fromarray(np.stack([grey, 0.8 * grey, 0.5 * grey], -1).astype(np.uint8)).save(folder / f"images/c{i}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"labels/c{i}.png")
    return folder


def volumes(folder: Path, count: int = 2, shape: tuple[int, int, int] = (28, 36, 6)) -> Path:
    """int16 NIfTI volumes named NAME_0000.nii.gz with labels 0, 1, 2."""
    rng = np.random.default_rng(1)
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    for i in range(count):
        label = np.stack([disc(rng, *shape[:2]) * (1 + (z % 3 == 2)) for z in range(shape[2])], -1).astype(np.uint8)
        image = (300.0 * label + rng.normal(0, 60, shape)).astype(np.int16)
        save_volume(folder / f"images/v{i}_0000.nii.gz", image)
        save_volume(folder / f"labels/v{i}.nii.gz", label)
    return folder


def save_volume(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Writes ``data`` as NIfTI in millimetres."""
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path

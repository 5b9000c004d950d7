"""A case as nnU-Net sees it: channels (c, z, y, x), voxel spacing in that order, and the geometry to write masks in."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmamba.errors import UserError
from vmamba.medical.cases import Case, is_volume
from vmamba.medical.labels import summary
from vmamba.medical.labelset import LabelSet
from vmamba.medical.readers import check_affine, load_header, read_image, read_label, restore, write_mask

FLAT = 999.0  # the spacing between "slices" of a picture, as nnU-Net has it


@dataclass(frozen=True)
class Volume:
    """Channels (c, z, y, x) float32 and the spacing of z, y, x in mm; a picture has one slice."""

    data: np.ndarray
    spacing: tuple[float, float, float]
    source: Path


def read_volume(paths: Sequence[Path], channels: int) -> Volume:
    """All channels of a case; UserError unless they have one geometry and are as many as the data set says."""
    for path in paths:
        _check_dimensions(path, paths[0])
    data = _axes(read_image(paths, 2), paths[0])
    if len(data) != channels:
        raise UserError(f"{paths[0]}: {len(data)} channel(s); dataset.json names {channels}")
    return Volume(data, _spacing(paths[0]), paths[0])


def read_truth(path: Path, image: Volume, labels: LabelSet) -> np.ndarray:
    """Label values (z, y, x) int16; UserError if geometry or values do not fit."""
    _check_dimensions(path, image.source)
    data = _axes(read_label(path, 2)[:, None], path)[0]
    if data.shape != image.data.shape[1:]:
        raise UserError(f"{path}: size {data.shape} (z, y, x) differs from {image.source}, {image.data.shape[1:]}")
    strange = np.setdiff1d(data, labels.values)
    if strange.size:
        raise UserError(f"{path}: label values {summary(strange)}; dataset.json allows {summary(labels.values)}")
    return data.astype(np.int16)


def read_case(case: Case, channels: int, labels: LabelSet) -> tuple[Volume, np.ndarray | None]:
    """Image and, if the case has one, label."""
    image = read_volume(case.images, channels)
    return image, None if case.label is None else read_truth(case.label, image, labels)


def write_label(path: Path, label: np.ndarray, like: Path) -> None:
    """Writes label values (z, y, x) in the geometry of the file ``like``, whole or not at all."""
    write_mask(path, label.transpose(0, 2, 1) if is_volume(like) else label, like, 2)


def original_axes(maps: np.ndarray, like: Path) -> np.ndarray:
    """(k, z, y, x) as the voxels lie in the file ``like``: (k, x, y, z), or (k, h, w) of a picture."""
    return restore(maps.transpose(0, 1, 3, 2) if is_volume(like) else maps, like, 2)


def _axes(stack: np.ndarray, path: Path) -> np.ndarray:
    """Slices (s, c, ...) to (c, z, y, x), or back: the pictures' two axes are (y, x), the volumes' (x, y)."""
    swapped = stack.swapaxes(0, 1)
    return swapped.swapaxes(2, 3) if is_volume(path) else swapped


def _check_dimensions(path: Path, first: Path) -> None:
    if not is_volume(path):
        return
    shape = load_header(path).shape
    if len(shape) > 3 and any(n > 1 for n in shape[3:]):
        raise UserError(f"{path}: shape {shape}; expected (x, y, z), one file per channel")
    check_affine(path, first)


def _spacing(path: Path) -> tuple[float, float, float]:
    if not is_volume(path):
        return FLAT, 1.0, 1.0
    zooms = [float(z) or 1.0 for z in (*load_header(path).header.get_zooms(), 1.0, 1.0)[:3]]
    return zooms[2], zooms[1], zooms[0]

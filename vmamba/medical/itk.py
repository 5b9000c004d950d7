"""NRRD and MetaImage volumes through SimpleITK, where it is installed; in memory they are NIfTI images."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from vmamba.errors import UserError

ENDINGS = (".nrrd", ".mha")
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's axes point to the left and to the back, NIfTI's right and to the front


def is_itk(path: Path) -> bool:
    """Whether SimpleITK reads ``path``, by its name."""
    return path.name.lower().endswith(ENDINGS)


def read(path: Path) -> Any:
    """The volume (x, y, z[, c]) with its affine, a ``nibabel.Nifti1Image``.

    UserError without SimpleITK, or for another number of dimensions.
    """
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)  # header and voxels are asked for one after the other
def _read(path: Path, *_: int) -> nibabel.Nifti1Image:
    itk = _library(path)
    image = itk.ReadImage(str(path))
    if image.GetDimension() != 3:
        raise UserError(f"{path}: {image.GetDimension()} dimensions; expected a volume (x, y, z)")
    data = itk.GetArrayFromImage(image)  # (z, y, x[, c])
    data = data.transpose(2, 1, 0, *range(3, data.ndim))
    data = data.astype(np.int32) if data.dtype in (np.int64, np.uint64) else data
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return nibabel.Nifti1Image(data, FLIP @ affine)


def write(path: Path, image: Any) -> None:
    """A volume (x, y, z) of nibabel's with its affine, compressed."""
    itk = _library(path)
    made = itk.GetImageFromArray(np.ascontiguousarray(np.asarray(image.dataobj).transpose(2, 1, 0)))
    affine = FLIP @ image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    made.SetSpacing(spacing.tolist())
    made.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    made.SetOrigin(affine[:3, 3].tolist())
    itk.WriteImage(made, str(path), True)


def _library(path: Path) -> Any:
    try:
        import SimpleITK  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{path}: {' and '.join(ENDINGS)} files need SimpleITK; pip install SimpleITK") from error
    return SimpleITK

"""Images with their labels in one file of arrays, as the 2D papers keep them: .npz slices, .npz and .npy.h5 volumes.

Nothing pickled is loaded. Such files know no millimetres; :data:`AFFINE` gives what is written of them a place.
"""

from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from vmamba.errors import UserError

KEYS = {"image": ("image", "img"), "label": ("label",)}
AFFINE = np.array([[0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
"""Of a mask (h, w, d) written as NIfTI: rows go down and columns to the right in a viewer, a voxel is 1 mm. It puts
every voxel where SimpleITK puts an array (d, h, w) without geometry."""


def read_array(path: Path, what: str) -> np.ndarray:
    """The ``image`` or the ``label`` in a file, (h, w, d); a slice (h, w) has d = 1.

    Raises:
        UserError: the file cannot be read, has no such array or one of other dimensions, or h5py is not installed.
    """
    read = _read_npz if path.name.lower().endswith(".npz") else _read_h5
    try:
        array = read(path, KEYS[what])
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise unreadable(path, error) from error
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "biuf":
        raise UserError(
            f"{path}: {what} is {array.dtype} of shape {tuple(array.shape)}; expected numbers (h, w) or (d, h, w)"
        )
    return array[..., None] if array.ndim == 2 else np.moveaxis(array, 0, -1)


def unreadable(path: Path, error: Exception) -> UserError:
    """The line for a file that some library could not read."""
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    size = path.stat().st_size if path.exists() else 0
    return UserError(f"{path}: cannot be read ({size} bytes; {reason}); is it complete and really {path.suffix}?")


def _read_npz(path: Path, keys: tuple[str, ...]) -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
        return file[_key(path, list(file), keys)]


def _read_h5(path: Path, keys: tuple[str, ...]) -> np.ndarray:
    if find_spec("h5py") is None:
        raise UserError(f"{path}: needs h5py to be read; pip install 'vmamba[medical]', or pip install h5py")
    import h5py

    with h5py.File(path, "r") as file:
        return np.asarray(file[_key(path, list(file), keys)])


def _key(path: Path, found: list[str], keys: tuple[str, ...]) -> str:
    for key in keys:
        if key in found:
            return key
    raise UserError(f"{path}: holds {', '.join(found) or 'nothing'}; expected an array named {' or '.join(keys)}")

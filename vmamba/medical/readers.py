"""Images and labels as stacks of slices, through MONAI's readers; masks written back with the input's geometry.

A NIfTI volume (x, y, z[, c]), or an array (h, w, d), is cut along ``axis``; a 2D image is a stack of one slice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.data.image_reader import NibabelReader, PILReader
from PIL import Image

from vmamba.errors import UserError
from vmamba.medical import itk
from vmamba.medical.arrays import AFFINE, read_array, unreadable
from vmamba.medical.cases import is_array, is_deep, is_volume
from vmamba.safety import replacing

_AS_RGB = {"P": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "L", "PA": "RGB"}


def read_image(paths: Sequence[Path], axis: int) -> np.ndarray:
    """Slices (s, c, h, w) float32 of the channel files of one case; UserError names the file at fault."""
    stacks = []
    for path in paths:
        stacks.append(_finite(_slices(_read(path, "image"), path, axis).astype(np.float32), path))
        if stacks[-1].shape[::2] + stacks[-1].shape[3:] != stacks[0].shape[::2] + stacks[0].shape[3:]:
            raise UserError(f"{path}: size {_size(stacks[-1])} differs from {paths[0].name}, {_size(stacks[0])}")
        check_affine(path, paths[0])
    return np.concatenate(stacks, axis=1)  # (s, c, h, w)


def read_label(path: Path, axis: int) -> np.ndarray:
    """Slices (s, h, w) int64 of a label file, values as stored; UserError if they are not whole or not one channel."""
    stack = _finite(_slices(_read(path, "label"), path, axis), path)
    if stack.shape[1] > 1 and (stack == stack[:, :1]).all():
        stack = stack[:, :1]
    if stack.shape[1] != 1:
        raise UserError(f"{path}: a label with {stack.shape[1]} channels; expected one channel of class numbers")
    whole = np.rint(stack).astype(np.int64)
    if np.abs(whole - stack).max(initial=0) > 1e-4:
        bad = stack[np.abs(whole - stack) > 1e-4][0]
        raise UserError(f"{path}: label value {bad:g} is not a whole number; expected classes 0, 1, 2, ...")
    return whole[:, 0]


def check_pair(image: np.ndarray, label: np.ndarray, images: Sequence[Path], label_path: Path) -> None:
    """UserError unless image (s, c, h, w) and label (s, h, w) agree in size and, for NIfTI, in voxel spacing."""
    if image.shape[::2] + image.shape[3:] != label.shape:
        raise UserError(f"{label_path}: size {_size(label[:, None])} differs from {images[0]}, {_size(image)}")
    if is_volume(images[0]) and is_volume(label_path):
        a, b = (np.array(load_header(p).header.get_zooms()[:3], float) for p in (images[0], label_path))
        if not np.allclose(a, b, rtol=1e-3):
            raise UserError(
                f"{label_path}: spacing {_mm(b)} differs from {images[0]}, {_mm(a)}; resample one to the other"
            )
        check_affine(label_path, images[0])


def check_affine(path: Path, first: Path) -> None:
    """UserError unless the voxels of two NIfTI files lie at the same places; other files have none."""
    if path == first or not (is_volume(path) and is_volume(first)):
        return
    a, b = read_affine(path), read_affine(first)
    if not np.allclose(a, b, rtol=1e-3, atol=1e-3):
        worst = np.unravel_index(np.abs(a - b).argmax(), a.shape)
        raise UserError(
            f"{path}: its affine differs from {first} ({a[worst]:g} instead of {b[worst]:g} in row {worst[0] + 1}, "
            f"column {worst[1] + 1}); resample one to the other"
        )


def write_mask(path: Path, mask: np.ndarray, like: Path, axis: int) -> None:
    """Writes ``mask`` (s, h, w) as uint8 (uint16 above 255) in the geometry of ``like``, whole or not at all."""
    data = mask.astype(np.uint8 if mask.max(initial=0) < 256 else np.uint16)
    with replacing(path) as partial:
        if is_volume(like):
            source = load_header(like)
            full = restore(data, like, axis)
            header = source.header.copy()
            header.set_data_dtype(full.dtype)
            header.set_slope_inter(1, 0)
            header["cal_min"], header["cal_max"] = 0, 0
            image = nibabel.Nifti1Image(full, source.affine, header)
            if itk.is_itk(path):
                itk.write(partial, image)
            else:
                nibabel.save(image, partial)
        elif is_array(like):
            image = nibabel.Nifti1Image(restore(data, like, axis), AFFINE)
            image.header.set_xyzt_units("mm")
            nibabel.save(image, partial)
        else:
            Image.fromarray(data[0]).save(partial)


def read_affine(path: Path) -> np.ndarray:
    """The 4 x 4 matrix from voxels to millimetres of a NIfTI file."""
    return np.asarray(load_header(path).affine)


def restore(stack: np.ndarray, like: Path, axis: int) -> np.ndarray:
    """A stack (s, h, w) or (k, s, h, w) in the orientation and shape of the input ``like``."""
    if not is_deep(like):
        return stack[..., 0, :, :]
    lead = stack.ndim - 3
    full = np.moveaxis(stack, lead, lead + axis)
    shape = load_header(like).shape if is_volume(like) else full.shape[lead:]
    return full.reshape(*full.shape[:lead], *shape[:3]) if len(shape) < 3 else full


def load_header(path: Path) -> Any:
    """A volume's file opened, of NIfTI without its voxels; UserError if it is none."""
    try:
        return itk.read(path) if itk.is_itk(path) else NibabelReader().read(path)
    except UserError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error


def _read(path: Path, what: str) -> np.ndarray:
    if is_array(path):
        return read_array(path, what)[..., None]  # (h, w, d, 1)
    return _read_volume(path) if is_volume(path) else _read_picture(path, colour=what == "image")


def _read_volume(path: Path) -> np.ndarray:
    image = load_header(path)
    if not isinstance(image, nibabel.Nifti1Image):
        raise UserError(f"{path}: read as {type(image).__name__}; expected NIfTI")
    try:
        data = np.asanyarray(image.dataobj)
    except Exception as error:
        raise unreadable(path, error) from error
    if data.dtype.names:
        data = np.stack([data[name] for name in data.dtype.names], axis=-1)
    if data.ndim == 2:
        data = data[:, :, None]
    if data.ndim == 5 and data.shape[3] == 1:
        data = data[:, :, :, 0]
    if data.ndim not in (3, 4) or 0 in data.shape:
        raise UserError(f"{path}: shape {tuple(data.shape)}; expected a volume (x, y, z) or (x, y, z, channels)")
    return data if data.ndim == 4 else data[..., None]  # (x, y, z, c)


def _read_picture(path: Path, colour: bool) -> np.ndarray:
    def convert(image: Any) -> Any:
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise UserError(f"{path}: holds {frames} pages; expected one (a stack can come as NIfTI)")
        if image.mode in ("RGBA", "LA", "PA") and image.getchannel("A").getextrema()[0] < 255:
            raise UserError(f"{path}: has transparent pixels ({image.mode}); save it without transparency")
        return image.convert(_AS_RGB[image.mode]) if image.mode in _AS_RGB and (colour or image.mode != "P") else image

    try:
        reader = PILReader(converter=convert, reverse_indexing=False)
        data = np.asarray(reader.get_data(reader.read(path))[0])
    except UserError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error
    if data.dtype == bool:
        data = data.astype(np.uint8) * 255
    return data[None] if data.ndim == 3 else data[None, ..., None]  # (1, h, w, c)


def _slices(raw: np.ndarray, path: Path, axis: int) -> np.ndarray:
    return np.moveaxis(np.moveaxis(raw, axis if is_deep(path) else 0, 0), -1, 1)  # (s, c, h, w)


def _finite(stack: np.ndarray, path: Path) -> np.ndarray:
    bad = int(np.count_nonzero(~np.isfinite(stack)))
    if bad:
        raise UserError(f"{path}: {bad} of {stack.size} values are NaN or infinite; replace them, with 0 for example")
    return stack


def _size(stack: np.ndarray) -> str:
    s, _, h, w = stack.shape
    return f"{h} x {w}" + (f", {s} slices" if s > 1 else "")


def _mm(zooms: np.ndarray) -> str:
    return " x ".join(f"{z:g}" for z in zooms) + " mm"

"""The embedded data set: nilearn's ICBM 2009a T1 template (1 mm), grey and white matter from its probability maps."""

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from vmamba.errors import UserError
from vmamba.medical.splits import split_slices

CLASSES = ["background", "grey matter", "white matter"]
BLOCKS = {"test": (0.40, 0.56), "val": (0.72, 0.82)}
GAP = 5
AXIS = 2


def load_mri() -> tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]:
    """(T1 image, labels 0 background, 1 grey matter, 2 white matter), cropped to the brain, axial slices last.

    A voxel takes the likelier of grey matter, white matter and neither. Source: nilearn's wheel, nothing is downloaded.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise UserError(
            f"the embedded MRI needs nilearn ({error}); pip install 'vmamba[medical]' or give --data"
        ) from error
    image = datasets.load_mni152_template(resolution=1)
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)
    labels = np.argmax(np.stack([1 - grey - white, grey, white]), axis=0).astype(np.uint8)
    t1 = np.rint(255 * image.get_fdata(dtype=np.float32)).astype(np.uint8)
    window = []
    for axis in range(3):
        inside = np.flatnonzero((labels > 0).any(axis=tuple({0, 1, 2} - {axis})))
        window.append(slice(int(inside[0]), int(inside[-1]) + 1))
    pictures = []
    for data in (t1, labels):
        whole = nibabel.Nifti1Image(data, image.affine)
        whole.header.set_xyzt_units("mm")
        pictures.append(whole.slicer[tuple(window)])
    return pictures[0], pictures[1]


def mri_split(label: np.ndarray) -> dict[str, np.ndarray]:
    """Slice numbers of train, val and test: blocks of axial slices that show the brain, 5 mm apart at least."""
    shown = np.flatnonzero((label > 0).mean(axis=(0, 1)) > 0.01)
    return split_slices(shown, BLOCKS, GAP)


def export_block(folder: Path, name: str, slices: Sequence[int]) -> tuple[Path, Path]:
    """Writes the block of slices as ``folder``/{images,labels}/NAME.nii.gz with its place in the brain kept."""
    paths = folder / "images" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz"
    for path, volume in zip(paths, load_mri(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(volume.slicer[:, :, slices[0] : slices[-1] + 1], path)
    return paths

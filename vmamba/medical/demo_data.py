"""The embedded MRI as an nnU-Net data set: pseudo-subjects made from nilearn's one template, and said to be so.

Subject i is the ICBM 2009a template with its grey and white matter, bent by a random field and of other contrast:

- the field: Gaussian noise, one vector a voxel, smoothed by 16 mm, scaled to at most 6 mm; labels take the nearest
  voxel;
- the contrast: intensity x, scaled to [0, 1], becomes gain x**gamma, times a smooth bias of at most 15 %, plus noise;
- every draw comes from numpy's default_rng((seed, i)).

They are one brain bent many ways: figures on them compare programs, not methods, and say nothing about patients.
"""

from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.model_folder import write_plain
from vmamba.medical.mri import CLASSES, load_mri
from vmamba.safety import only_writer

NAME = "Dataset900_MNI152"
SMOOTH, FARTHEST = 16.0, 6.0  # mm
GAMMA, GAIN, BIAS, NOISE = (0.7, 1.4), (0.8, 1.2), 0.15, 0.02


def subject(seed: int, number: int, spacing: float) -> tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]:
    """(T1 uint8, labels uint8) of one pseudo-subject in voxels of ``spacing`` mm; the same for the same numbers."""
    image, label = load_mri()
    draw = np.random.default_rng((seed, number))
    shape = [max(round(n / spacing), 1) for n in image.shape]
    grid = np.stack(np.meshgrid(*(np.arange(n) * spacing for n in shape), indexing="ij"))
    field = np.stack([gaussian_filter(draw.standard_normal(shape), SMOOTH / spacing) for _ in range(3)])
    places = grid + FARTHEST * field / np.abs(field).max()
    t1 = map_coordinates(np.asanyarray(image.dataobj).astype(np.float32) / 255, places, order=1, mode="constant")
    classes = map_coordinates(np.asanyarray(label.dataobj), places, order=0, mode="constant")
    bias = gaussian_filter(draw.standard_normal(shape), 2 * SMOOTH / spacing)
    bright = draw.uniform(*GAIN) * t1 ** draw.uniform(*GAMMA) * (1 + BIAS * bias / np.abs(bias).max())
    bright = np.where(t1 > 0, bright + draw.normal(0, NOISE, shape), 0)
    affine = image.affine @ np.diag([spacing, spacing, spacing, 1])
    pictures = []
    for data in (np.rint(200 * np.clip(bright, 0, 1.25)).astype(np.uint8), classes.astype(np.uint8)):
        picture = nibabel.Nifti1Image(data, affine)
        picture.header.set_xyzt_units("mm")
        pictures.append(picture)
    return pictures[0], pictures[1]


def write_demo(
    root: Path, *, subjects: int = 12, test: int = 3, spacing: float = 2.0, seed: int = 0, progress: bool = True
) -> Path:
    """Writes ROOT/nnUNet_raw/Dataset900_MNI152 with ``subjects`` to train and ``test`` more; returns its folder."""
    if subjects < 1 or test < 0 or not 0.5 <= spacing <= 16:
        raise UserError(f"{subjects} + {test} subjects of {spacing} mm: expected at least one, and 0.5 to 16 mm")
    folder = root / "nnUNet_raw" / NAME
    if folder.exists():
        raise UserError(f"{folder}: exists; give another folder")
    partial = root / "nnUNet_raw" / f".partial-{NAME}"
    with only_writer(root / "nnUNet_raw"):
        for number in tqdm(range(subjects + test), desc="demo-data", unit="subject", disable=not progress):
            part, name = ("Tr" if number < subjects else "Ts"), f"pseudo_{number:02d}"
            files = f"images{part}/{name}_0000.nii.gz", f"labels{part}/{name}.nii.gz"
            for file, picture in zip(files, subject(seed, number, spacing), strict=True):
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                nibabel.save(picture, partial / file)
        about = (__doc__ or "").split("\n\n")
        write_plain(
            partial / "dataset.json",
            {
                "channel_names": {"0": "T1"},
                "labels": {name: i for i, name in enumerate(CLASSES)},
                "numTraining": subjects,
                "file_ending": ".nii.gz",
                "name": NAME,
                "description": " ".join(about[0].split()),
                "made_by": {"seed": seed, "spacing_mm": spacing, "about": [" ".join(p.split()) for p in about[1:]]},
                "reference": "ICBM 2009a nonlinear symmetric, from nilearn's wheel",
            },
        )
        for name in ("nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir(exist_ok=True)
        partial.rename(folder)
    return folder

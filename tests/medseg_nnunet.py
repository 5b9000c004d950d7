"""Tiny data sets in nnU-Net's layout for the tests of medseg, and the words of short trainings on them."""

import json
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

LABELS = {"background": 0, "shell": 1, "core": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
SMALL = ["--set", "dims=8,16", "--set", "depths=1,1", "--set", "depths_decoder=1,1"]
FLAT = ["-tr", "nnUNetTrainerVMUNet", *SMALL]
DEEP = ["-tr", "nnUNetTrainerUMambaBot", "--set", "features=(4,8)", "--set", "strides=((1,1,1),(2,2,2))"]
DEEP += ["--set", "kernels=(3,3)"]
SHORT = ["--epochs", "2", "--iterations", "3", "--val-iterations", "1", "--lr", "3e-3", "--optimizer", "adamw"]
SHORT += ["-device", "cpu", "--no-progress", "--batch-size", "2", "--disable_tta"]


def ball(shape, centre, radius) -> np.ndarray:
    """bool of ``shape``"""
    places = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return (places**2).sum(0) < radius**2


def dataset(
    root: Path,
    name: str = "Dataset007_Bälle",
    *,
    cases: int = 5,
    test: int = 2,
    shape=(20, 18, 12),
    spacing=(1.0, 1.0, 2.0),
    channels: int = 1,
    labels=None,
    ending: str = ".nii.gz",
) -> Path:
    """A bright shell with a brighter core, somewhere; label 3, if there is one, covers a slab. Returns the folder."""
    folder, labels = root / "nnUNet_raw" / name, labels or LABELS
    rng = np.random.default_rng(3)
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).mkdir(parents=True)
    for i in range(cases + test):
        part = "Tr" if i < cases else "Ts"
        size = np.add(shape, rng.integers(0, 3, 3)) if ending != ".png" else np.array([1, 34 + i, 40])
        centre = size * rng.uniform(0.4, 0.6, 3)
        radius = min(size[-2:]) * 0.35
        label = ball(size, centre, radius).astype(np.uint8) + ball(size, centre, radius / 2)
        picture = 100 + 100 * label + rng.normal(0, 10, size)
        if "ignore" in labels:
            label[:2] = labels["ignore"]
        for c in range(channels):
            save(folder / f"images{part}/fäll_{i}_{c:04d}{ending}", picture + 5 * c, spacing)
        save(folder / f"labels{part}/fäll_{i}{ending}", label, spacing)
    write_description(folder, labels, cases, channels, ending)
    return folder


def write_description(folder: Path, labels, cases: int, channels: int = 1, ending: str = ".nii.gz") -> None:
    """dataset.json"""
    data = {"channel_names": {str(i): "MR" for i in range(channels)}, "labels": labels, "numTraining": cases}
    data["file_ending"] = ending
    if any(isinstance(v, list) for v in labels.values()):
        data["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(data), encoding="utf-8")


def save(path: Path, data: np.ndarray, spacing=(1.0, 1.0, 2.0)) -> None:
    """A NIfTI file in mm, or a grey picture."""
    if path.suffix == ".png":
        Image.fromarray(np.clip(data[0], 0, 255).astype(np.uint8)).save(path)
        return
    whole = data if data.dtype == np.uint8 else data.astype(np.float32)
    image = nibabel.Nifti1Image(whole, np.diag([*spacing, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)

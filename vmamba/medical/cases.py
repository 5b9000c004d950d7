"""Which files belong together: images/ and labels/ paired by name, nnU-Net's channel suffix tolerated."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmamba.errors import UserError

VOLUMES = (".nii.gz", ".nii", ".nrrd", ".mha")
LOSSLESS = (".png", ".bmp", ".tif", ".tiff")
IMAGES = (*VOLUMES, *LOSSLESS, ".jpg", ".jpeg")
LABELS = (*VOLUMES, *LOSSLESS)
ARRAYS = (".npy.h5", ".h5", ".npz")  # image and label in one file
_CHANNEL = re.compile(r"_\d{4}$")


@dataclass(frozen=True)
class Case:
    """One case: its name, one file per channel group in order, and its label file (None when predicting)."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


def ending(path: Path, endings: Sequence[str] = IMAGES) -> str | None:
    """The ending of ``path`` among ``endings`` (lower case; .nii.gz counts as one), or None."""
    name = path.name.lower()
    return next((e for e in endings if name.endswith(e) and len(name) > len(e)), None)


def is_volume(path: Path) -> bool:
    """Whether ``path`` is a NIfTI, NRRD or MetaImage file by its name."""
    return ending(path, VOLUMES) is not None


def is_array(path: Path) -> bool:
    """Whether ``path`` is a file of arrays by its name."""
    return ending(path, ARRAYS) is not None


def is_deep(path: Path) -> bool:
    """Whether ``path`` is read as (x, y, z), to be cut along an axis; a picture is one slice."""
    return is_volume(path) or is_array(path)


def stem(path: Path) -> str:
    """The file name without its image ending: ``a/b.nii.gz`` -> ``b``."""
    return path.name[: len(path.name) - len(ending(path, (*IMAGES, *ARRAYS)) or "")]


def list_images(folder: Path, endings: Sequence[str] = IMAGES) -> dict[str, Path]:
    """``{stem: path}`` of the image files in ``folder``, sorted; UserError if it is missing or two share a stem."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with files ending in {', '.join(endings)}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or ending(path, endings) is None:
            continue
        if stem(path) in found:
            raise UserError(f"{path}: has the same name as {found[stem(path)].name}; keep one file per name")
        found[stem(path)] = path
    return found


def pair_cases(folder: Path) -> list[Case]:
    """Pairs ``folder``/images with ``folder``/labels: NAME.ext, or NAME_0000.ext, NAME_0001.ext ... per channel."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a data set with images/ and labels/")
    images, labels = list_images(folder / "images"), list_images(folder / "labels", LABELS)
    groups: dict[str, list[Path]] = {}
    for name, path in images.items():
        groups.setdefault(name if name in labels else _CHANNEL.sub("", name), []).append(path)
    if not set(groups) & set(labels):
        raise UserError(
            f"{folder}: no image and label of the same name among {len(images)} file(s) in images/ and {len(labels)} "
            "in labels/; expected images/NAME.png (or NAME_0000.png) with labels/NAME.png"
        )
    for name in sorted(set(groups) ^ set(labels)):
        if name in groups:
            raise UserError(
                f"{groups[name][0]}: image without label; expected {folder / 'labels' / name}.* or no image"
            )
        raise UserError(f"{labels[name]}: label without image; expected {folder / 'images' / name}.* or no label")
    cases = [Case(name, tuple(paths), labels[name]) for name, paths in sorted(groups.items())]
    for case in cases:
        if len(case.images) != len(cases[0].images):
            raise UserError(
                f"{case.images[0]}: case {case.name} has {len(case.images)} channel file(s), {cases[0].name} has "
                f"{len(cases[0].images)}; every case needs the same channels"
            )
    return cases


def has_suffix(cases: Iterable[Case]) -> bool:
    """Whether any case uses nnU-Net's names (NAME_0000.ext)."""
    return any(stem(path) != case.name for case in cases for path in case.images)


def input_cases(inputs: Sequence[Path], files: int, suffix: bool) -> list[Case]:
    """Cases to predict from files and folders: ``files`` each, named NAME_0000... if ``suffix``, as in training."""
    paths: list[Path] = []
    for item in inputs:
        if item.is_dir():
            paths += (list_images(item) or list_images(item, ARRAYS)).values()
        elif not item.is_file():
            raise UserError(f"{item}: no such file or folder; expected images ending in {', '.join(IMAGES)}")
        elif ending(item, (*IMAGES, *ARRAYS)) is None:
            raise UserError(f"{item}: not an image; expected a file ending in {', '.join(IMAGES)}")
        else:
            paths.append(item)
    if not paths:
        raise UserError(f"{inputs[0]}: holds no image; expected files ending in {', '.join(IMAGES)}")
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_CHANNEL.sub("", stem(path)) if suffix else stem(path), []).append(path)
    for name, group in groups.items():
        if len(group) != files:
            raise UserError(
                f"{group[0]}: case {name} comes in {len(group)} file(s) "
                f"({', '.join(p.name for p in group[:4])}), but the model was trained with {files} per case"
            )
    return [Case(name, tuple(sorted(group))) for name, group in groups.items()]

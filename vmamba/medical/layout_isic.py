"""ISIC 2017 and 2018 as VM-UNet and its followers lay them out: train/ and val/ (and test/) of images/ and masks/."""

from pathlib import Path

from vmamba.errors import UserError
from vmamba.medical.cases import LOSSLESS, Case, list_images
from vmamba.medical.layout import Layout, Parts

PICTURES = (*LOSSLESS, ".jpg", ".jpeg")
SUFFIX = "_segmentation"  # of the challenge's own masks


def _find(folder: Path) -> Parts:
    needed = [folder / part / kind for part in ("train", "val") for kind in ("images", "masks")]
    for path in needed:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
    parts = {part: _cases(folder / part) for part in ("train", "val")}
    return parts | ({"test": _cases(folder / "test")} if (folder / "test").is_dir() else {})


def _cases(folder: Path) -> list[Case]:
    images, masks = (list_images(folder / kind, PICTURES) for kind in ("images", "masks"))
    if not images:
        raise UserError(f"{folder / 'images'}: no picture; expected files ending in {', '.join(PICTURES)}")
    masks = {name.removesuffix(SUFFIX) if name not in images else name: path for name, path in masks.items()}
    for name in sorted(set(images) ^ set(masks)):
        if name in images:
            raise UserError(f"{images[name]}: no mask of this name in {folder / 'masks'}")
        raise UserError(f"{masks[name]}: no image of this name in {folder / 'images'}")
    return [Case(name, (path,), masks[name]) for name, path in images.items()]


ISIC = Layout(
    name="ISIC",
    words="train/images, train/masks, val/images, val/masks and, if you like, test/images, test/masks; png or jpg "
    "pictures and masks of 0 and 255 of the same names",
    classes=("background", "lesion"),
    values=(0, 255),
    marks=("train/images", "train/masks", "val/images", "val/masks", "test/masks"),
    find=_find,
    convention="isic",
    recipe="vmunet-isic",
    scored_at=(256, 256),
)

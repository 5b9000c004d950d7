"""TimmDataset: a folder of images per class, or any other data set that timm reads, with timm's transforms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from timm.data import create_dataset, create_transform
from torch.utils.data import Dataset

from vmamba.errors import UserError


@DATASETS.register_module(name="TimmDataset")
def timm_dataset(root: str, split: str, transform: "Mapping[str, Any]", *, name: str = "", **options: Any) -> Dataset:
    """Pairs (image, label): what the transform makes of an image, (3, h, w), and the number of its class.

    Args:
        root: the folder, as ``data/imagenet``, with ``train/CLASS/NAME.JPEG`` and ``val/CLASS/NAME.JPEG``.
        split: ``train`` or ``validation``.
        transform: arguments of ``timm.data.create_transform``: ``input_size``, ``is_training``, ``auto_augment`` ...
        name: a data set of ``timm.data.create_dataset``, as ``hfds/ILSVRC/imagenet-1k``; by default the folder.
        **options: further arguments of ``timm.data.create_dataset``.

    Raises:
        UserError: there is no such folder, or it has no such split, or it has no images.
    """
    if not name:
        _check(Path(root), split)
    try:
        dataset: Any = create_dataset(name, root, split=split, **options)
    except RuntimeError as error:
        raise UserError(f"{root} has no images for {split}: {error}") from error
    dataset.transform = create_transform(**transform)
    classes = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if classes:
        dataset.metainfo = {"classes": tuple(classes)}
    return dataset


def _check(root: Path, split: str) -> None:
    if not root.is_dir():
        raise UserError(f"no folder at {root}; put ImageNet there, as {root}/train/CLASS/NAME.JPEG")
    folders = {"train": ("train", "training"), "validation": ("val", "validation")}
    if split not in folders:
        raise UserError(f"a folder has the splits {' and '.join(folders)}, got {split!r}")
    if not any((root / folder).is_dir() for folder in folders[split]):
        raise UserError(f"{root} has no folder {folders[split][0]}, with a folder of images for each class")

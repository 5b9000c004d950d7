"""Pictures of a folder of predictions: each case's image beside its masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vmamba.errors import UserError
from vmamba.medical.cases import IMAGES, LABELS, is_volume, list_images
from vmamba.medical.plots import save_overlay
from vmamba.medical.readers import read_image, read_label
from vmamba.safety import only_writer, replacing

AXIS = 2


def draw_folder(
    images: Path, masks: Mapping[str, Path], output: Path, names: Sequence[str] = (), *, limit: int | None = None
) -> list[Path]:
    """``output``/NAME.png of every case that all folders of ``masks`` (title -> folder) have; their paths.

    ``names`` are those of the classes, background first; by default their numbers.
    """
    pictures = list_images(images, IMAGES)
    folders = {title: list_images(folder, LABELS) for title, folder in masks.items()}
    known = sorted(set.intersection(*(set(files) for files in folders.values())))
    cases = {name: pictures.get(f"{name}_0000", pictures.get(name)) for name in known}
    found = {name: path for name, path in cases.items() if path is not None}
    if not found:
        where = " and ".join(str(folder) for folder in masks.values())
        raise UserError(f"{images}: no image NAME_0000.* or NAME.* of a mask in {where}")
    written = []
    with only_writer(output):
        for name, path in list(found.items())[:limit]:
            image = read_image([path], AXIS)
            stacks = {title: read_label(files[name], AXIS) for title, files in folders.items()}
            for title, stack in stacks.items():
                if stack.shape != image.shape[::2] + image.shape[3:]:
                    raise UserError(f"{folders[title][name]}: its size differs from {path}")
            if any(stack.max() == 255 for stack in stacks.values()):
                stacks = {title: (stack > 0).astype(stack.dtype) for title, stack in stacks.items()}
            last = max(int(stack.max()) for stack in stacks.values())
            classes = list(names) if len(names) > last else ["background", *map(str, range(1, last + 1))]
            target = output / f"{name}.png"
            with replacing(target) as partial:
                save_overlay(partial, image, stacks, classes, upright=is_volume(path))
            written.append(target)
    return written

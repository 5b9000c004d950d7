"""Shapes as files: one set of pictures in the layouts of COCO (boxes and masks) and of ADE20K (a class a pixel)."""

import json
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.contrib.concurrent import process_map

from vmamba.errors import UserError
from vmamba.shapes import CLASSES, Picture, picture

PARTS = {"train": ("train2017", "training"), "val": ("val2017", "validation")}  # names in COCO, in ADE20K
GROUND = 1  # the number of what is no shape in ADE20K's label files, where 0 is left out; shapes follow
QUALITY = 95  # of JPEG


def write_shapes(root: Path, *, images: int = 1000, val: int = 200, seed: int = 0, progress: bool = True) -> Path:
    """Write ``images`` pictures to train on and ``val`` others to ``root``, in two layouts; returns ``root``.

    - ``root/coco``: ``train2017``, ``val2017`` and ``annotations/instances_*.json``; masks as run lengths, exact;
    - ``root/ade``: ``images`` and ``annotations`` with ``training`` and ``validation``; label 1 is the ground.

    Raises:
        UserError: ``root`` exists, cannot be written, or the numbers make no sense. Nothing is left behind then.
    """
    if images < 1 or val < 1:
        raise UserError(f"{images} pictures to train on and {val} to validate: at least one of each is needed")
    if root.exists():
        raise UserError(f"{root}: exists; give another folder")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".partial-{root.name}-") as scratch:
            _write(Path(scratch, root.name), {"train": images, "val": val}, seed, progress)
            os.replace(Path(scratch, root.name), root)
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror or error})") from error
    return root


def _write(root: Path, counts: Mapping[str, int], seed: int, progress: bool) -> None:
    first = 0
    for part, count in counts.items():
        draw, numbers = partial(_draw, root, part, seed), range(first, first + count)
        bar: dict[str, Any] = {"desc": f"shapes, {part}", "unit": "picture", "disable": not progress}
        drawn = process_map(draw, numbers, chunksize=8, **bar)
        images, shapes = [image for image, _ in drawn], [shape for _, some in drawn for shape in some]
        annotations = [{"id": i, **shape} for i, shape in enumerate(shapes, start=1)]
        _describe(root / f"coco/annotations/instances_{PARTS[part][0]}.json", images, annotations, seed)
        first += count


def _draw(root: Path, part: str, seed: int, number: int) -> tuple[dict, list[dict]]:
    """Write one picture and its labels; COCO's entries of it and of its shapes."""
    (coco, ade), drawn, name = PARTS[part], picture(seed, number), f"{number:06d}.jpg"
    _save(drawn.image, root / "coco" / coco / name, quality=QUALITY)
    _save(drawn.image, root / "ade/images" / ade / name, quality=QUALITY)
    _save(labels(drawn), root / "ade/annotations" / ade / f"{number:06d}.png")
    height, width = drawn.image.shape[:2]
    image = {"id": number, "file_name": name, "height": height, "width": width}
    return image, [{"image_id": number, **annotation(shape.label, shape.mask)} for shape in drawn.shapes]


def labels(drawn: Picture) -> np.ndarray:
    """(h, w) uint8 in ADE20K's numbers: 1 the ground, then ``CLASSES``."""
    result = np.full(drawn.image.shape[:2], GROUND, np.uint8)
    for shape in drawn.shapes:
        result[shape.mask] = GROUND + 1 + shape.label
    return result


def annotation(label: int, mask: np.ndarray) -> dict:
    """COCO's fields of a mask (h, w) bool: category, area in pixels, box (x, y, width, height), run lengths."""
    y, x = np.nonzero(mask)
    box = [int(v) for v in (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)]
    runs = {"size": list(mask.shape), "counts": run_lengths(mask)}
    return {"category_id": label + 1, "area": len(x), "bbox": box, "segmentation": runs, "iscrowd": 0}


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask (h, w) bool down its columns, zeros first: COCO's uncompressed encoding."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def _save(pixels: np.ndarray, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def _describe(path: Path, images: list[dict], annotations: list[dict], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES, start=1)]
    info = {"description": "shapes of vmamba shapes", "seed": seed}
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))

"""Pictures of textured shapes on textured grounds, with the exact mask of each: to try detectors and segmentors on.

Everything of picture i comes from numpy's ``default_rng((seed, i))``. Colours and textures say nothing about the class;
a shape that lies under others keeps the mask of what is seen of it. One picture in seven has no shapes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

Field = np.ndarray  # (h, w) float
SIDES = 224, 321  # pixels, from the first to before the second
RADII = 16.0, 60.0  # pixels
MOST = 6  # shapes in a picture
HIDDEN = 0.2  # of a shape may lie under a later one
TRIES = 30
CONTRAST = 55.0  # grey levels between the mean colours of a shape and of the ground under it


class Shape(NamedTuple):
    """A class (its number in ``CLASSES``) and the pixels (h, w) bool of it that are seen."""

    label: int
    mask: np.ndarray


class Picture(NamedTuple):
    """``image`` (h, w, 3) uint8 RGB, and its shapes from the lowest to the topmost."""

    image: np.ndarray
    shapes: list[Shape]


def _box(x: Field, y: Field, width: float, height: float) -> Field:
    return np.maximum(abs(x) - width, abs(y) - height)


def _triangle(x: Field, y: Field) -> Field:
    sides = [np.cos(a) * x + np.sin(a) * y for a in np.pi * np.array([1 / 2, 7 / 6, 11 / 6])]
    return np.maximum.reduce(sides) - 0.5


DISTANCES: dict[str, Callable[[Field, Field], Field]] = {  # below 0 inside a shape of radius 1
    "disc": lambda x, y: np.hypot(x, y) - 0.9,
    "square": lambda x, y: _box(x, y, 0.75, 0.75),
    "triangle": _triangle,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.22,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95)),
}
CLASSES = tuple(DISTANCES)


def picture(seed: int, number: int) -> Picture:
    """The picture ``number`` of a ``seed``; the same for the same two numbers."""
    draw = np.random.default_rng((seed, number))
    h, w = draw.integers(*SIDES, size=2)
    image, shapes = _texture(draw, h, w), []
    for _ in range(draw.integers(MOST + 1)):
        for _ in range(TRIES):
            label, distance = _placed(draw, h, w)
            mask = distance < 0
            if all((shape.mask & mask).sum() <= HIDDEN * shape.mask.sum() for shape in shapes):
                break
        else:
            continue
        _paint(draw, image, distance)
        shapes = [Shape(shape.label, shape.mask & ~mask) for shape in shapes] + [Shape(label, mask)]
    image += 4 * draw.standard_normal(image.shape, np.float32)
    return Picture(np.clip(np.rint(image), 0, 255).astype(np.uint8), shapes)


def _placed(draw: np.random.Generator, h: int, w: int) -> tuple[int, Field]:
    """A class, and the distance (h, w) in pixels of each pixel's centre from a shape of it, below 0 inside."""
    label, radius, turn = draw.integers(len(CLASSES)), np.exp(draw.uniform(*np.log(RADII))), draw.uniform(0, 2 * np.pi)
    y, x = ((np.arange(n) + 0.5 - draw.uniform(radius, n - radius)) / radius for n in (h, w))
    y, x = np.meshgrid(y.astype(np.float32), x.astype(np.float32), indexing="ij")
    cos, sin = np.cos(turn), np.sin(turn)
    return int(label), radius * DISTANCES[CLASSES[label]](cos * x + sin * y, cos * y - sin * x)


def _texture(draw: np.random.Generator, h: int, w: int) -> np.ndarray:
    """(h, w, 3): blotches of three sizes and a grating, around a mean colour."""
    total = np.tile(draw.uniform(60, 195, 3).astype(np.float32), (h, w, 1))
    for cells, strength in ((3, 25), (9, 14), (40, 8)):
        for c, coarse in enumerate(draw.standard_normal((3, cells, cells), np.float32)):
            total[..., c] += strength * np.asarray(Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC))
    angle, period = draw.uniform(0, np.pi), draw.uniform(5, 40)
    wave = np.add.outer(np.sin(angle) * np.arange(h), np.cos(angle) * np.arange(w))
    total += draw.uniform(0, 18) * np.sin(2 * np.pi * wave / period + draw.uniform(0, 6))[..., None]
    return total


def _paint(draw: np.random.Generator, image: np.ndarray, distance: Field) -> None:
    """Fill a shape of ``image`` in place, with a soft edge of one pixel, by a texture that stands out in the mean."""
    rows, columns = (np.flatnonzero((distance < 0.5).any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    ground, opacity = image[box], np.clip(0.5 - distance[box], 0, 1)[..., None]
    texture, under = _texture(draw, *ground.shape[:2]), ground[distance[box] < 0].mean(0)
    mean = texture.mean((0, 1))
    if np.abs(mean - under).mean() < CONTRAST:
        texture += under + np.where(under > 127, -CONTRAST, CONTRAST) - mean
    image[box] += opacity * (texture - ground)

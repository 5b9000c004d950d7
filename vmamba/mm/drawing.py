"""Predictions drawn over a picture: instances with their names and scores, or a map of classes with a legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vmamba.mm.palette import Classes, Colour, percent

OPACITY = 0.5
LEAST = 512  # smaller pictures are enlarged, by a whole number, so that text beside them can be read
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Instance:
    """A detected object: class, score, box in pixels (x0, y0, x1, y1), and its mask (h, w) bool if there is one."""

    label: int
    score: float
    box: Box
    mask: np.ndarray | None = None


def enlargement(height: int, width: int) -> int:
    """By how much an overlay is larger than its picture."""
    return -(-LEAST // max(height, width))


def draw_instances(image: np.ndarray, instances: Sequence[Instance], classes: Classes) -> Image.Image:
    """``image`` (h, w, 3) uint8 under masks and boxes in their classes' colours, each with its class and score."""
    times = enlargement(*image.shape[:2])
    canvas, unit = _enlarged(image, times), _unit(image, times)
    by_size = sorted(instances, key=lambda i: (i.box[2] - i.box[0]) * (i.box[3] - i.box[1]), reverse=True)
    for instance in by_size:
        if instance.mask is not None:
            _shade(canvas, _enlarged(instance.mask.astype(np.uint8), times), classes.colour(instance.label), unit // 8)
    picture = Image.fromarray(canvas)
    pen, font = ImageDraw.Draw(picture), _font(unit)
    for instance in by_size:
        pen.rectangle(_times(instance.box, times), outline=classes.colour(instance.label), width=max(1, unit // 6))
    taken: list[Box] = []
    for instance in sorted(instances, key=lambda i: i.score, reverse=True):
        text = f"{classes.name(instance.label)} {instance.score:.2f}"
        _, _, width, height = map(round, pen.textbbox((unit // 4, unit // 8), text, font=font))
        place = _place(_times(instance.box, times), (width + unit // 4, height + unit // 8), picture.size, taken)
        taken.append(place)
        colour = classes.colour(instance.label)
        pen.rectangle(place, fill=colour)
        pen.text((place[0] + unit // 4, place[1] + unit // 8), text, fill=_readable_on(colour), font=font)
    return picture


def draw_classes(image: np.ndarray, labels: np.ndarray, classes: Classes) -> Image.Image:
    """``image`` (h, w, 3) uint8 under its class indices (h, w) in their colours, above a legend with their shares."""
    times = enlargement(*image.shape[:2])
    present, counts = np.unique(labels, return_counts=True)
    table = np.zeros((max(int(present.max()) + 1, 1), 3), np.uint8)
    for index in present:
        table[index] = classes.colour(int(index))
    colours = table[labels]
    shaded = (image * (1 - OPACITY) + colours * OPACITY).round().astype(np.uint8)
    canvas, colours = _enlarged(shaded, times), _enlarged(colours, times)
    edges = _edges(_enlarged(labels, times))
    canvas[edges] = colours[edges]
    order = np.argsort(-counts, kind="stable")
    shares = [(int(present[i]), int(counts[i]) / labels.size) for i in order]
    entries = [(f"{classes.name(index)} {percent(share)}", classes.colour(index)) for index, share in shares]
    return _with_legend(Image.fromarray(canvas), entries, _unit(image, times))


def _enlarged(pixels: np.ndarray, times: int) -> np.ndarray:
    return np.ascontiguousarray(pixels.repeat(times, 0).repeat(times, 1))


def _unit(image: np.ndarray, times: int) -> int:
    """The size of the text, from which all others follow."""
    return max(13, round(0.02 * times * max(image.shape[:2])))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _shade(canvas: np.ndarray, mask: np.ndarray, colour: Colour, width: int) -> None:
    """Tint ``canvas`` where ``mask`` (h, w) uint8 is, and draw its outline inside it."""
    x, y, w, h = cv2.boundingRect(mask)
    part, mask = canvas[y : y + h, x : x + w], mask[y : y + h, x : x + w]
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    inside = cv2.erode(mask, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    part[mask > 0] = (part[mask > 0] * (1 - OPACITY) + np.array(colour) * OPACITY).round().astype(np.uint8)
    part[mask > inside] = colour


def _times(box: Box, times: int) -> Box:
    x0, y0, x1, y1 = box
    return times * x0, times * y0, times * x1, times * y1


def _edges(labels: np.ndarray) -> np.ndarray:
    """Where the pixel to the right or below is of another class."""
    edges = np.zeros(labels.shape, bool)
    edges[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edges[:-1] |= labels[1:] != labels[:-1]
    return edges


def _place(box: Box, size: tuple[int, int], picture: tuple[int, int], taken: Sequence[Box]) -> Box:
    """Where the text of a box goes: above it, inside it or below it, inside the picture, and where no other text is."""
    (x0, y0, x1, y1), (width, height) = box, size
    corners = [(x, y) for x in (x0, x1 - width) for y in (y0 - height, y0, y1 - height, y1)]
    inside = [(x, y) for x, y in corners if 0 <= y <= picture[1] - height] or [(x0, 0)]
    places = [(max(0, min(x, picture[0] - width)), y) for x, y in inside]
    boxes = [(x, y, x + width, y + height) for x, y in places]
    return next((b for b in boxes if not any(_overlap(b, other) for other in taken)), boxes[0])


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _readable_on(colour: Colour) -> Colour:
    """Black on bright colours, white on dark ones."""
    return BLACK if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else WHITE


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, Colour]], unit: int) -> Image.Image:
    """``picture`` above rows of coloured squares with their texts."""
    font, row, gap = _font(unit), round(1.6 * unit), unit // 2
    widths = [round(unit + gap + font.getlength(text) + 2 * gap) for text, _ in entries]
    width = max(picture.width, max(widths) + gap)
    places, x, y = [], gap, picture.height + gap
    for entry in widths:
        if x + entry > width and x > gap:
            x, y = gap, y + row
        places.append((x, y))
        x += entry
    sheet = Image.new("RGB", (width, y + row), WHITE)
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for (text, colour), (x, y) in zip(entries, places, strict=True):
        pen.rectangle((x, y, x + unit, y + unit), fill=colour, outline=BLACK)
        pen.text((x + unit + gap, y + unit / 2), text, fill=BLACK, font=font, anchor="lm")
    return sheet

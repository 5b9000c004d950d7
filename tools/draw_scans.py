"""Scans as pictures: one panel per route, an arrow per step, coloured from the first step to the last."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vmamba.scans import Scan

COLOURS = ListedColormap(colormaps["plasma"](np.linspace(0, 0.9, 256)))
ACROSS = 8  # panels in a row of the picture
PIXEL, GAP, HEAD, FOOT = 0.17, 0.16, 0.36, 0.6  # inches: a map's pixel, between panels, above them, at the bottom


def save(path: Path, scans: Sequence[Scan], h: int, w: int) -> None:
    """Draw ``scans`` into a PNG of few colours, a third of the size of a full one, with their names as description."""
    full, facts = BytesIO(), PngInfo()
    draw(scans, h, w).savefig(full, dpi=100)
    facts.add_text("Description", ", ".join(scan.name for scan in scans))
    picture = Image.open(full).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(path, "PNG", optimize=True, pnginfo=facts)


def draw(scans: Sequence[Scan], h: int, w: int) -> Figure:
    """The routes of ``scans`` over an (h, w) map.

    Steps to a neighbour are thick, jumps thin; zeros are left out. Where a route visits a pixel again, its arrows are
    drawn a little lower and to the right.
    """
    places = _places([scan.count for scan in scans])
    step_x, step_y = w * PIXEL + GAP, h * PIXEL + HEAD
    down, across = (max(place[axis] for block in places for place in block) + 1 for axis in (0, 1))
    width, height = across * step_x + GAP, down * step_y + FOOT
    figure = Figure(figsize=(width, height))
    for scan, block in zip(scans, places, strict=True):
        for route, (row, column) in zip(scan.order(h, w).numpy(), block, strict=True):
            left, bottom = GAP + column * step_x, height - (row + 1) * step_y
            axes = figure.add_axes((left / width, bottom / height, w * PIXEL / width, h * PIXEL / height))
            _panel(axes, route, h, w)
            if (row, column) == block[0]:
                axes.set_title(scan.name, loc="left", fontsize=10, pad=3, fontweight="bold")
    legend = figure.add_axes((GAP / width, 0.15 / height, min(2.4, width - 2 * GAP) / width, 0.1 / height))
    bar = figure.colorbar(ScalarMappable(cmap=COLOURS), cax=legend, orientation="horizontal", ticks=[])
    bar.outline.set_visible(False)
    legend.set_title("first step (dot) to last step (square)", loc="left", fontsize=8, pad=2)
    return figure


def _places(counts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Row and column of each panel; a scan's panels stay in one row where they fit into one."""
    places, row, column = [], 0, 0
    for count in counts:
        if column and column + count > ACROSS:
            row, column = row + 1, 0
        block = [(row + (column + k) // ACROSS, (column + k) % ACROSS) for k in range(count)]
        places.append(block)
        row, column = block[-1][0], block[-1][1] + 1
    return places


def _panel(axes: Axes, route: np.ndarray, h: int, w: int) -> None:
    axes.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5), xticks=np.arange(w + 1) - 0.5, yticks=np.arange(h + 1) - 0.5)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.grid(color="#e4e4e4", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[:].set_color("#b0b0b0")
    step = np.flatnonzero(route < h * w)
    if not len(step):
        return
    pixel, colours = route[step], COLOURS(step / max(len(route) - 1, 1))
    visit = np.array([np.count_nonzero(pixel[:i] == p) for i, p in enumerate(pixel)])
    y, x = (place + 0.22 * (visit - visit.max() / 2) for place in np.divmod(pixel, w))
    axes.scatter(x, y, s=5, color=colours, linewidths=0)
    dx, dy = np.diff(x), np.diff(y)
    near, follows = np.maximum(abs(dx), abs(dy)) < 1.5, np.diff(step) == 1
    thin, thick = {"width": 0.008, "headwidth": 5.0, "alpha": 0.6}, {"width": 0.018, "headwidth": 3.2}
    for chosen, look in ((follows & ~near, thin), (follows & near, thick)):
        s = np.flatnonzero(chosen)
        arrows: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "headlength": 3.6, "headaxislength": 3.6, **look}
        axes.quiver(x[s], y[s], dx[s], dy[s], color=colours[s], scale=1, **arrows)
    for end, marker in ((0, "o"), (-1, "s")):
        axes.plot(x[end], y[end], marker, color=colours[end], markersize=5, markeredgecolor="white", zorder=3)

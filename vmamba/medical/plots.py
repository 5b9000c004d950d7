"""Pictures of a run: curves of loss and Dice, and masks over images beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2", "#999999")
OPACITY = 0.65
STRETCH = 0.5, 99.5  # percentiles that are shown black and white


def save_curves(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Training loss and validation Dice (mean and each class) over the epochs of metrics.csv."""
    epochs = [int(row["epoch"]) for row in rows]
    classes = [key for key in rows[0] if key.startswith("dice_")]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, dice = figure.subplots(1, 2)
    marker = "o" if len(epochs) == 1 else None
    loss.plot(epochs, [float(row["train_loss"]) for row in rows], color="black", marker=marker)
    loss.set(title="Training loss (cross entropy + Dice)", xlabel="epoch", ylabel="loss", ylim=(0, None))
    for i, key in enumerate(classes if len(classes) > 1 else []):
        values, name = [float(row[key]) for row in rows], key.removeprefix("dice_")
        dice.plot(epochs, values, color=_colour(i + 1), label=name, marker=marker)
    mean = [float(row["val_dice"]) for row in rows]
    dice.plot(epochs, mean, color="black", linestyle="--", label="mean", marker=marker)
    best = int(np.argmax(mean))
    dice.plot(epochs[best], mean[best], "o", color="black", label=f"best: {mean[best]:.3f}")
    dice.set(title="Dice on the validation slices", xlabel="epoch", ylabel="Dice", ylim=(0, 1))
    dice.legend(loc="lower right", frameon=False, fontsize=9)
    for axes in (loss, dice):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


def save_overlay(
    path: Path,
    image: np.ndarray,
    masks: Mapping[str, np.ndarray],
    classes: Sequence[str],
    *,
    slices: Mapping[int, str] | None = None,
    upright: bool = False,
    title: str = "",
) -> None:
    """A row a slice: the image, then the image under each mask, with a legend of the classes.

    Args:
        path: the PNG to write.
        image: slices (s, c, h, w), one or three channels shown. masks: title -> classes (s, h, w).
        classes: names, background first.
        slices: slice number -> its name at the left; by default up to three spread over those with foreground.
        upright: turn slices of a NIfTI volume so that the second axis points up.
        title: of the whole picture.
    """
    slices = slices or {s: f"slice {s}" if len(image) > 1 else "" for s in choose_slices(next(iter(masks.values())))}
    columns = ["image", *masks]
    ratio = image.shape[2] / image.shape[3] if not upright else image.shape[3] / image.shape[2]
    head = 0.9 if title else 0.6
    figure = Figure(figsize=(3 * len(columns), 3 * ratio * len(slices) + head), layout="constrained")
    grid = figure.subplots(len(slices), len(columns), squeeze=False)
    for row, (s, name) in zip(grid, slices.items(), strict=True):
        grey = shown(image[s], *np.percentile(image[s], STRETCH))
        pictures = [grey, *(_blend(grey, mask[s]) for mask in masks.values())]
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(np.rot90(picture) if upright else picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(name, fontsize=10)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize=12)
    handles = [Patch(color=_colour(k), label=classes[k]) for k in range(1, min(len(classes), 13))]
    room = int(72 * figure.get_figwidth() / (45 + 6 * max(map(len, classes))))  # columns of the legend, in points
    columns = max(min(len(handles), 6, room), 1)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
    if title:
        figure.suptitle(title, fontsize=13)
    figure.savefig(path, dpi=100)


def choose_slices(mask: np.ndarray, count: int = 3) -> list[int]:
    """Up to ``count`` slice numbers spread over the slices of (s, h, w) with foreground, over all if there is none."""
    shown = np.flatnonzero((mask > 0).any(axis=(1, 2)))
    shown = shown if shown.size else np.arange(len(mask))
    places = np.linspace(0, 1, min(count, len(shown)) + 2)[1:-1] * (len(shown) - 1)
    return shown[np.unique(np.rint(places).astype(int))].tolist()


def _colour(k: int) -> str:
    return COLOURS[(k - 1) % len(COLOURS)]


def shown(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """(c, h, w) -> (h, w, 3), from ``low`` to ``high`` stretched over [0, 1]; three channels or the first as grey."""
    scaled = np.clip((image - low) / max(high - low, 1e-8), 0, 1)
    return np.moveaxis(scaled[:3] if len(scaled) >= 3 else np.repeat(scaled[:1], 3, 0), 0, -1)


def _blend(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = grey.copy()
    for k in np.unique(mask[mask > 0]):
        rgb = np.array([int(_colour(int(k))[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        out[mask == k] = (1 - OPACITY) * out[mask == k] + OPACITY * rgb
    return out

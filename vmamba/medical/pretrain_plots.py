"""Pictures of a pre-training: its loss, and slices beside what is visible of them and what is rebuilt."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vmamba.medical.plots import STRETCH, shown

Turn = Callable[[np.ndarray], np.ndarray]  # (h, w, 3) as it lies in memory -> as it is looked at
HIDDEN = 0.35  # grey of hidden cells


def save_loss(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """The loss and the rate over the epochs of metrics.csv."""
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("train_loss", "lr"), ("Error over hidden cells", "Learning rate"), strict=True
    ):
        axes.plot(epochs, [float(row[key]) for row in rows], color="black", marker="o" if len(rows) == 1 else None)
        axes.set(title=title, xlabel="epoch", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


def save_rebuilt(path: Path, image: np.ndarray, mask: np.ndarray, rebuilt: np.ndarray, turn: Turn) -> None:
    """A row a slice: the image, what the network sees of it, and hidden cells as it rebuilds them.

    Args:
        path: the PNG to write.
        image, rebuilt: (s, c, h, w), one or three channels shown. mask: (s, h, w) booleans, true where visible.
        turn: how a slice is looked at.
    """
    columns = "image", "visible", "rebuilt"
    height, width = turn(np.zeros((*image.shape[2:], 3))).shape[:2]
    figure = Figure(figsize=(9, 3 * height / width * len(image) + 0.4), layout="constrained")
    for i, row in enumerate(figure.subplots(len(image), 3, squeeze=False)):
        low, high = np.percentile(image[i], STRETCH)
        whole, made = (shown(x[i], low, high) for x in (image, rebuilt))
        pictures = whole, np.where(mask[i][..., None], whole, HIDDEN), made
        for axes, picture, title in zip(row, pictures, columns, strict=True):
            axes.imshow(turn(picture), interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=title if i == 0 else "")
            axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=80)

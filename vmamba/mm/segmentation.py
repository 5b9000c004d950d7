"""What a segmentor says of pictures, as overlays with a legend and as maps of class indices."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vmamba.errors import UserError
from vmamba.mm.drawing import draw_classes
from vmamba.mm.files import write_json, write_png
from vmamba.mm.palette import Classes, percent, shortened

CLASSES = "classes.json"


class Segmentation:
    """Outputs of a segmentor: ``labels/NAME.png``, ``overlays/NAME.png`` and ``classes.json``.

    A label's PNG has one channel with the class index of each pixel, 8 bits (16 for more than 256 classes).
    """

    folders = ("labels", "overlays")

    def __init__(self, classes: Classes):
        self.classes = classes

    def write(self, image: np.ndarray, sample: Any, files: Sequence[Path]) -> dict[str, Any]:
        """Write a picture's labels and overlay to ``files``; returns its size and how many pixels each class has.

        Raises:
            UserError: the sample has no map of classes.
        """
        if "pred_sem_seg" not in sample:
            raise UserError("the network predicts no map of classes; vmamba segment is for semantic segmentation")
        dtype = np.uint8 if len(self.classes.names) <= 256 else np.uint16
        labels = sample.pred_sem_seg.data[0].cpu().numpy().astype(dtype)
        write_png(files[0], Image.fromarray(labels))
        write_png(files[1], draw_classes(image, labels, self.classes))
        height, width = labels.shape
        pixels = {str(i): int(n) for i, n in zip(*np.unique(labels, return_counts=True), strict=True)}
        return {"width": width, "height": height, "pixels": pixels}

    def collect(self, folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Write ``classes.json``: which index is which class, in which colour."""
        pairs = zip(self.classes.names, self.classes.colours, strict=True)
        write_json(folder / CLASSES, [{"index": i, "name": name, "colour": c} for i, (name, c) in enumerate(pairs)])

    def counts(self, records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
        """How many pixels each class has in all pictures, the most frequent first."""
        pixels: Counter[int] = Counter()
        for record in records:
            pixels.update({int(index): count for index, count in record["pixels"].items()})
        return {self.classes.name(index): count for index, count in pixels.most_common()}

    def headline(self, counts: Mapping[str, int]) -> str:
        """``counts`` in a few words."""
        total = sum(counts.values())
        return shortened(f"{name} {percent(n / total)}" for name, n in counts.items())

"""A layout: how a data set of the 2D papers lies on the disk, and what its files mean."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmamba.errors import UserError
from vmamba.medical.cases import Case
from vmamba.medical.labels import to_classes
from vmamba.medical.labelset import LabelSet
from vmamba.medical.readers import check_pair, read_image, read_label

Parts = dict[str, list[Case]]
_SLICE = re.compile(r"_slice.*$")
MIDDLE = 128


@dataclass(frozen=True)
class Layout:
    """One layout; the objects are in :data:`vmamba.medical.layouts.LAYOUTS`.

    Args:
        name: as the papers call it. words: what lies where.
        classes: their names, background first. values: what the label files hold for each.
        marks: paths relative to the folder, any of which tells the layout; ``*`` is allowed.
        find: the folder -> its cases by part, ``train`` and one of ``val`` and ``test`` at least; UserError if files
            are missing.
        convention: of the metrics. recipe: of the training.
        scored_at: the size at which the papers compare masks; None: the files' own.
    """

    name: str
    words: str
    classes: tuple[str, ...]
    values: tuple[int, ...]
    marks: tuple[str, ...]
    find: Callable[[Path], Parts]
    convention: str
    recipe: str
    scored_at: tuple[int, int] | None = None

    @property
    def binary(self) -> bool:
        """Whether the masks hold 0 and 255."""
        return self.values == (0, 255)

    @property
    def labels(self) -> LabelSet:
        """The classes by name; the values of a binary mask are 0 and 1 after :meth:`label`."""
        return LabelSet(self.classes[1:], tuple((n,) for n in range(1, len(self.classes))))

    def marked(self, folder: Path) -> list[str]:
        """The marks that are there."""
        return [mark for mark in self.marks if next(folder.glob(mark), None) is not None]

    def parts(self, folder: Path) -> Parts:
        """The cases by part; UserError if only a part of the layout is there."""
        try:
            return self.find(folder)
        except UserError as error:
            there = ", ".join(self.marked(folder))
            half = f"half of {self.name}'s layout is there ({there})"
            raise UserError(f"{error}; {half}, expected {self.words}") from error

    def tested(self, folder: Path) -> list[Case]:
        """The cases that the paper reports: the test part, or the validation part where there is none."""
        parts = self.parts(folder)
        return parts.get("test") or parts["val"]

    def read(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """Image (s, c, h, w) float32 and classes (s, h, w) of a case; UserError names the file at fault."""
        assert case.label is not None
        image = read_image(case.images, 2)
        label = self.label(case.label)
        check_pair(image, label, case.images, case.label)
        return image, label

    def label(self, path: Path) -> np.ndarray:
        """Classes (s, h, w) of a label file; a mask's greys count as foreground from the middle on."""
        label = read_label(path, 2)
        if not self.binary:
            return to_classes(label, list(self.values), str(path))
        if label.min() < 0 or not (label.max() in (0, 255) or label.max() >= MIDDLE):
            raise UserError(f"{path}: values from {label.min()} to {label.max()}; expected a mask of 0 and 255")
        return (label >= MIDDLE).astype(np.uint8)


def group(name: str) -> str:
    """The patient or scan that a slice is of: ``case0005_slice012`` -> ``case0005``."""
    return _SLICE.sub("", name)


def missing(names: Sequence[str], what: str) -> UserError:
    """The error for files that a list names but that are not there."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return UserError(f"{names[0]}{more}: {what}")

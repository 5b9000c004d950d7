"""Class numbers from label values: consecutive from 0, or a binary mask 0/255."""

from collections.abc import Iterable

import numpy as np

from vmamba.errors import UserError


def label_values(found: dict[str, np.ndarray]) -> list[int]:
    """The value of each class, from ``{file: unique values}``: [0, 1, ..., K-1] or [0, 255]."""
    values = sorted({int(v) for unique in found.values() for v in unique})
    if values in ([0, 255], [255]):
        return [0, 255]
    for name, unique in found.items():
        if min(unique) < 0:
            raise UserError(f"{name}: label value {min(unique)}; expected classes 0, 1, 2, ...")
    if len(values) < 2:
        raise UserError(
            f"{next(iter(found))}: the labels hold the value {values[0]} only; expected at least two classes"
        )
    if values != list(range(len(values))):
        gap = next(v for v in range(len(values)) if v not in values)
        name = next(n for n, unique in found.items() if max(unique) > gap)
        raise UserError(
            f"{name}: label values {summary(values)}, class {gap} is missing; expected consecutive numbers "
            f"0..{len(values) - 1}, or a binary mask of 0 and 255"
        )
    return values


def to_classes(label: np.ndarray, values: list[int], name: str) -> np.ndarray:
    """Class numbers (uint8; uint16 from 256 classes) of a label array; UserError for a value that is no class."""
    strange = np.setdiff1d(label, values)
    if strange.size:
        raise UserError(f"{name}: label values {summary(strange)}; expected only {summary(values)}")
    return np.searchsorted(values, label).astype(np.uint8 if len(values) <= 256 else np.uint16)


def summary(values: Iterable[int]) -> str:
    """``0, 1, 2`` or, for many, ``0, 1, 2, ... 250 (140 values)``."""
    items = [str(int(v)) for v in values]
    return ", ".join(items) if len(items) <= 8 else f"{', '.join(items[:3])}, ... {items[-1]} ({len(items)} values)"

"""Labels of an nnU-Net data set: classes or overlapping regions, and the label that training ignores."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmamba.errors import UserError


@dataclass(frozen=True)
class LabelSet:
    """What the network predicts and how it becomes a label map.

    Args:
        names: of the targets, in the order of ``targets``.
        targets: the label values of each class (one value) or region; the background of classes is not among them.
        order: the value that each region writes, later ones over earlier ones; None for classes.
        ignore: the value that neither trains nor counts, or None.
    """

    names: tuple[str, ...]
    targets: tuple[tuple[int, ...], ...]
    order: tuple[int, ...] | None = None
    ignore: int | None = None

    @property
    def outputs(self) -> int:
        """Channels of the network: regions, or classes with the background."""
        return len(self.targets) + (self.order is None)

    @property
    def keys(self) -> list[str]:
        """The targets as summary.json writes them: ``1``, or ``(1, 2)`` for a region of several values."""
        return [str(t[0]) if len(t) == 1 else str(t) for t in self.targets]

    @property
    def values(self) -> list[int]:
        """All values that a label file may hold."""
        found = {0, *(v for target in self.targets for v in target), *(self.order or ())}
        return sorted(found if self.ignore is None else {*found, self.ignore})

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (k, ...) to softmax over classes, or to a sigmoid for each region."""
        return logits.sigmoid() if self.order else logits.softmax(0)

    def label_map(self, probabilities: "Tensor | np.ndarray") -> np.ndarray:
        """Probabilities (k, ...) to label values int16: the likeliest class, or regions above 0.5 in their order.

        They are decided where the probabilities lie, and come to main memory then.
        """
        maps = torch.as_tensor(probabilities)
        if self.order is None:
            return maps.argmax(0).short().cpu().numpy()
        out = torch.zeros(maps.shape[1:], dtype=torch.int16, device=maps.device)
        for value, channel in zip(self.order, maps, strict=True):
            out[channel > 0.5] = value
        return out.cpu().numpy()

    def regions(self, label: Tensor) -> Tensor:
        """Label values (b, 1, ...) to one float channel a region (b, k, ...)."""
        return torch.cat([sum((label == v) for v in target) for target in self.targets], 1).float()  # pyright: ignore


def classes(last: int) -> LabelSet:
    """Classes 1 to ``last``, named by their numbers."""
    numbers = range(1, last + 1)
    return LabelSet(tuple(map(str, numbers)), tuple((n,) for n in numbers))


def label_set(dataset: dict[str, Any], source: str) -> LabelSet:
    """The labels of a dataset.json; ``source`` names it in errors (UserError)."""
    labels = dict(dataset.get("labels", {}))
    if "background" not in labels or len(labels) < 2:
        raise UserError(f'{source}: labels {labels}; expected {{"background": 0, NAME: 1, ...}}')
    ignore = labels.pop("ignore", None)
    labels.pop("background")
    try:
        targets = tuple(
            tuple(int(v) for v in (value if isinstance(value, list | tuple) else [value])) for value in labels.values()
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: a label is no number and no list of numbers ({error})") from error
    order = None
    if any(isinstance(value, list | tuple) for value in labels.values()):
        order = tuple(int(v) for v in dataset.get("regions_class_order", ()))
        if len(order) != len(targets):
            raise UserError(
                f"{source}: {len(targets)} regions but regions_class_order has {len(order)} entries; expected one each"
            )
    values = sorted({v for target in targets for v in target})
    if values != list(range(1, len(values) + 1)):
        raise UserError(f"{source}: label values {values}; expected consecutive numbers from 1")
    if ignore is not None and ignore != len(values) + 1:
        raise UserError(f"{source}: the ignore label is {ignore}; expected {len(values) + 1}, after all others")
    return LabelSet(tuple(labels), targets, order, ignore)

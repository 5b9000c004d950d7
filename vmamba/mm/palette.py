"""The classes that a network tells apart: their names and colours, and their counts in words."""

import colorsys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from vmamba.errors import UserError

Colour = tuple[int, int, int]
GOLDEN = 0.618034  # neighbours in this sequence of hues lie far apart


@dataclass(frozen=True)
class Classes:
    """Names and colours (RGB, 0 to 255) by class index; ``origin`` says where the names are from."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    origin: str

    @classmethod
    def find(cls, meta: Any, metainfo: Callable[[], Mapping], count: int | None) -> "Classes":
        """The classes of a checkpoint's ``meta``, else those of the configuration's data set, else numbers.

        Args:
            meta: what mmengine stores beside the weights (``dataset_meta``), or its predecessor (``CLASSES``).
            metainfo: gives ``classes`` and ``palette`` of the data set.
            count: how many classes the head has, if it says so.

        Raises:
            UserError: there are not as many names as the head has classes.
        """
        meta = meta if isinstance(meta, Mapping) else {}
        stored = meta.get("dataset_meta") or meta
        stored = {str(key).lower(): value for key, value in stored.items()} if isinstance(stored, Mapping) else {}
        origin = "checkpoint"
        if not stored.get("classes"):
            stored, origin = metainfo(), "configuration"
        names = stored.get("classes")
        if not names:
            names, origin = [f"class {i}" for i in range(count or 0)], "numbers"
        names = (names,) if isinstance(names, str) else tuple(map(str, names))
        if count is not None and len(names) != count:
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise UserError(f"the head has {count} classes, but the {origin} names {len(names)}: {shown}")
        return cls(names, colours(stored.get("palette"), len(names)), origin)

    def name(self, index: int) -> str:
        """The name of a class, or its number."""
        return self.names[index] if 0 <= index < len(self.names) else f"class {index}"

    def colour(self, index: int) -> Colour:
        """The colour of a class."""
        return self.colours[index] if 0 <= index < len(self.colours) else distinct(index)


def colours(palette: Any, count: int) -> tuple[Colour, ...]:
    """The palette of a data set if it is one, ``count`` triples of 0 to 255; otherwise colours of our own."""
    with suppress(ValueError, TypeError):
        table = np.asarray(palette)
        if table.shape == (count, 3) and table.dtype.kind in "iu" and not ((table < 0) | (table > 255)).any():
            return tuple((int(r), int(g), int(b)) for r, g, b in table)
    return tuple(map(distinct, range(count)))


def distinct(index: int) -> Colour:
    """A bright colour unlike that of neighbouring indices.

    >>> distinct(0), distinct(1)
    ((255, 64, 64), (64, 120, 255))
    """
    r, g, b = colorsys.hsv_to_rgb(index * GOLDEN % 1, 0.75, 1.0)
    return round(255 * r), round(255 * g), round(255 * b)


def percent(share: float) -> str:
    """A share of 1 as a text; what is too small to be shown is not called nothing.

    >>> percent(0.25), percent(0.0001)
    ('25.0%', '<0.1%')
    """
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"


def shortened(texts: Iterable[str], most: int = 5) -> str:
    """The first of ``texts`` in a row, with dots if there are more."""
    texts = list(texts)
    return ", ".join([*texts[:most], *(["..."] if len(texts) > most else [])])

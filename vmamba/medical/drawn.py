"""MONAI's transforms on one sample: every draw from one seed, and nothing written down that nobody reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.transforms.compose import Compose
from monai.transforms.transform import Randomizable


def transformed(transform: Compose, sample: dict[str, Any], seed: int) -> dict[str, Any]:
    """``transform`` of {key: tensor}, as plain tensors; ``seed`` decides all its draws.

    ``Compose.set_random_state`` would make a Mersenne twister for each transform, and the history of what was done to
    a sample would be kept with it: together half the time of a small patch.
    """
    draws = np.random.RandomState(np.random.SFC64(seed))
    for part in transform.transforms:
        if isinstance(part, Randomizable):
            part.set_random_state(state=draws)
    with _untracked():
        return cast(dict[str, Any], transform(sample))


@contextmanager
def _untracked() -> Iterator[None]:
    """Without MONAI's ``MetaTensor``."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)

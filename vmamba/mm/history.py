"""mmengine's checkpoints hold the history of the logs; this lets PyTorch read it although it runs no code of a file.

From PyTorch 2.6 on files are read with ``weights_only=True``, which mmengine before its forks did not reckon with:
``--resume`` failed with "Unsupported global". What is allowed here is data and four methods by name, nothing else.
"""

import pickle
from typing import Any

import torch
from mmengine.logging import HistoryBuffer

from vmamba.inert import NUMPY, Inert

METHODS = ("min", "max", "current", "mean")


def method(owner: Any, name: str) -> Any:
    """A statistic of ``HistoryBuffer``; stands for ``getattr``, by which pickles refer to methods.

    Of the stand-in under which :mod:`vmamba.inert` reads histories there are none.

    Raises:
        pickle.UnpicklingError: anything else is asked for.
    """
    if owner is Inert:
        return None
    if owner is not HistoryBuffer or name not in METHODS:
        raise pickle.UnpicklingError(f"a checkpoint may not refer to the attribute {name!r} of {owner!r}")
    return getattr(owner, name)


def register() -> None:
    """Let ``torch.load`` read histories."""
    torch.serialization.add_safe_globals([HistoryBuffer, (method, "builtins.getattr"), *NUMPY])

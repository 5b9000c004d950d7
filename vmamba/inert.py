"""What official checkpoints hold beside tensors, read without running code of theirs: as empty mappings.

Training files keep arguments (Vim), configurations (VMamba) or the history of the logs (mmengine) next to the weights.
PyTorch refuses such files unless the classes are allowed by name; here an inert stand-in is allowed in their place.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch


class Inert:
    """Makes an empty mapping, whatever it is made with, and takes no part in anything."""

    def __new__(cls, *args) -> Any:
        return OrderedDict()


STAND_INS = (
    "argparse.Namespace",
    "builtins.getattr",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "yacs.config.CfgNode",
)
CORE: Any = np._core if hasattr(np, "_core") else np.core  # its name before and since NumPy 2
NUMPY: list[tuple[Callable, str]] = [
    *((getattr(CORE.multiarray, f), f"numpy.{c}.multiarray.{f}") for f in ("_reconstruct", "scalar") for c in ("core", "_core")),
    *((kind, f"numpy.{kind.__name__}") for kind in (np.ndarray, np.dtype)),
    *((type(np.dtype(kind)), f"numpy.dtypes.{type(np.dtype(kind)).__name__}") for kind in "bBhHiIlLqQefd?"),
]


def inert() -> AbstractContextManager:
    """Inside it, ``torch.load`` reads arrays, and what ``STAND_INS`` names as empty mappings; nothing else is allowed."""
    known = {f"{f.__module__}.{f.__qualname__}" if callable(f) else f[1] for f in torch.serialization.get_safe_globals()}
    return torch.serialization.safe_globals([*NUMPY, *((Inert, name) for name in STAND_INS if name not in known)])

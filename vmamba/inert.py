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


NAMES = (
    "argparse.Namespace",
    "builtins.getattr",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "yacs.config.CfgNode",
)
CORE: Any = getattr(np, "_core", None) or np.core  # its name since NumPy 2, and before
MAKERS = ("_reconstruct", "scalar")
DTYPES = [type(np.dtype(kind)) for kind in "bBhHiIlLqQefd?"]
NUMPY: list[tuple[Callable, str]] = [
    *((getattr(CORE.multiarray, f), f"numpy.{core}.multiarray.{f}") for f in MAKERS for core in ("core", "_core")),
    *((kind, f"numpy.{kind.__name__}") for kind in (np.ndarray, np.dtype)),
    *((kind, f"numpy.dtypes.{kind.__name__}") for kind in DTYPES),
]


def inert() -> AbstractContextManager:
    """Inside it, ``torch.load`` reads arrays, and what ``NAMES`` lists as empty mappings; nothing else is allowed."""
    allowed = torch.serialization.get_safe_globals()
    known = {f[1] if isinstance(f, tuple) else f"{f.__module__}.{f.__qualname__}" for f in allowed}
    ours = [*NUMPY, *((Inert, name) for name in NAMES)]
    return torch.serialization.safe_globals([(stand_in, name) for stand_in, name in ours if name not in known])

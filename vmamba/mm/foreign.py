"""Checkpoints of anywhere, for mmengine: read without running code of theirs, whatever they hold beside the weights.

mmengine reads a file that PyTorch refuses once more, with everything in it allowed. Here a refused file is an error.
"""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.runner import CheckpointLoader

from vmamba.errors import UserError
from vmamba.inert import Inert
from vmamba.mm import weights

NAMES = ("argparse.Namespace", "yacs.config.CfgNode")
PLACES = ("", "http://", "https://")  # what an address begins with


def load(filename: str, map_location: Any = None) -> Mapping:
    """The content of a checkpoint on the CPU, from where it is copied to where it belongs.

    Raises:
        UserError: there is no such file, or it is no checkpoint, or holds objects that could run code.
    """
    try:
        return weights.read(filename)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def register() -> None:
    """Let mmengine load by :func:`load`, and ``torch.load`` read arguments as empty mappings."""
    torch.serialization.add_safe_globals([(Inert, name) for name in NAMES])
    CheckpointLoader.register_scheme(prefixes=PLACES, loader=load, force=True)

"""What the commands share: a network of the zoo by name, without weights, and a sub-command's parser."""

import argparse
from typing import TYPE_CHECKING, Any

from torch import nn

from vmamba.errors import UserError

if TYPE_CHECKING:
    from vmamba.registry import Entry


def add_command(subparsers: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    """A sub-command's parser, with its one-line ``text`` and an ``example`` below its options."""
    return subparsers.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def skeleton(name: str, **overrides: Any) -> nn.Module:
    """The network ``name`` on the meta device: shapes without storage.

    Raises:
        UserError: the name is unknown; the message has near matches.
    """
    import torch

    from vmamba.registry import create_model

    entry_of(name)
    with torch.device("meta"):
        return create_model(name, **overrides)


def entry_of(name: str) -> "Entry":
    """The zoo's entry of ``name``, also for a backbone's ``<name>_backbone``.

    Raises:
        UserError: the name is unknown; the message has near matches.
    """
    from vmamba.registry import entries, find

    try:
        return find(name if name in entries() else name.removesuffix("_backbone"))
    except ValueError as error:
        raise UserError(f"{error}; vmamba list shows them all") from None


def parameters(model: nn.Module) -> int:
    """How many trainable numbers the model holds."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)

"""The zoo's timm models as the protocol tests use them: every name, and one small network of every kind."""

import timm
import torch
from torch import Tensor, nn

from vmamba.registry import entries

SHRINK = {  # setting -> what a small network has instead
    "depths": lambda depths: tuple(1 + (i == 2) for i in range(len(depths))),
    "dim": lambda dim: 16,
    "drop_path_rate": lambda rate: 0.1,
}
NAMES = [name for name, entry in entries().items() if entry.timm is not None]


def shrunk(name: str) -> dict:
    """Settings that make ``name`` small without changing what it is built of."""
    return {key: shrink(entries()[name].settings[key]) for key, shrink in SHRINK.items()}


def _kind(name: str) -> str:
    entry = entries()[name]
    return str((entry.cls, sorted({**entry.settings, **shrunk(name)}.items())))


KINDS = list({_kind(name): name for name in reversed(NAMES)}.values())[
    ::-1
]  # one name of every kind: the rest differ in size alone


def small(name: str, **options) -> nn.Module:
    """A small network of the kind of ``name``, made by timm, the same weights each time."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**shrunk(name), **options})


def image(batch: int = 1, channels: int = 3, height: int = 64, width: int | None = None) -> Tensor:
    """(batch, channels, height, width), the same values each time."""
    return torch.randn(batch, channels, height, width or height, generator=torch.Generator().manual_seed(1))

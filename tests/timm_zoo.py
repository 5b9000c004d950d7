"""The zoo's timm models as the protocol tests use them: every name, and one small network of every kind."""

import math

import timm
import torch
from torch import Tensor, nn

from vmamba.registry import entries

SHRINK = {  # setting -> what a small network has instead
    "depths": lambda depths: tuple(1 + (i == 2) for i in range(len(depths))),
    "depth": lambda depth: 4,
    "dim": lambda dim: 16,
    "dims": lambda dims: tuple(16 * 2**i for i in range(len(dims))),
    "drop_path_rate": lambda rate: 0.1,
    "shuffle_rate": lambda rate: 0.0,  # its own tests have the shuffle; these compare passes with each other
    "registers": lambda count: 4,
    "reduce": lambda reduce: min(reduce, 2),
    "stem_dim": lambda dim: 8,
    "heads": lambda heads: tuple(2**i for i in range(len(heads))) if isinstance(heads, tuple) else 4,
    "windows": lambda windows: tuple(side and 3 for side in windows),
}
NAMES = [name for name, entry in entries().items() if entry.timm is not None]


def shrunk(name: str) -> dict:
    """Settings that make ``name`` small without changing what it is built of."""
    settings = entries()[name].settings
    return {key: shrink(settings[key]) for key, shrink in SHRINK.items() if key in settings}


def _kind(name: str) -> str:
    entry = entries()[name]
    return str((entry.cls, sorted({**entry.settings, **shrunk(name)}.items())))


KINDS = list({_kind(name): name for name in reversed(NAMES)}.values())[
    ::-1
]  # one name of every kind: the rest differ in size alone


PYRAMIDS = [name for name in KINDS if entries()[name].cls.output_fmt != "NLC"]  # the others are columns of tokens


def shallow(name: str) -> dict:
    """Settings of a network of two levels."""
    settings = entries()[name].settings
    return {key: value for key, value in (("depths", (1, 1)), ("depth", 2)) if key in settings}


def small(name: str, **options) -> nn.Module:
    """A small network of the kind of ``name``, made by timm, the same weights each time."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**shrunk(name), **options})


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers before the logits: one, or two whose logits are averaged."""
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def map_of(model: nn.Module, features: Tensor, like: Tensor) -> Tensor:
    """What ``forward_features`` returns as a map (b, h, w, c) of the size of ``like``: the patches among the tokens."""
    return model.stem.to_map(features, tuple(like.shape[1:3])) if model.output_fmt == "NLC" else features


def check_side(side: int, full: int, reduction: int) -> None:
    """The side of a map made from an image's by convolutions of any padding, as timm's own tests want it."""
    assert full / (2 * reduction) < side <= math.ceil(full / reduction) + 1


def image(batch: int = 1, channels: int = 3, height: int = 64, width: int | None = None) -> Tensor:
    """(batch, channels, height, width), the same values each time."""
    return torch.randn(batch, channels, height, width or height, generator=torch.Generator().manual_seed(1))

"""Segmentor: what networks for images and for volumes share that give every pixel its classes."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.block import reset_parameters
from vmamba.checkpoint import LoadReport, fit, load_checkpoint
from vmamba.protocol import TimmModel
from vmamba.pyramid import pyramid_of
from vmamba.registry import create_model

SIDES = {2: "height, width", 3: "depth, height, width"}


class Segmentor(nn.Module):
    """Image (b, in_chans, *grid) -> logits (b, num_classes, *grid); a grid is (h, w), or (d, h, w) of a volume.

    A network defines :meth:`decode` and ``outputs``, the layers from its maps to logits, coarsest first. The sides of
    an image must be multiples of ``stride``, a number or one for each side.

    Args:
        num_classes: classes of the map.
        in_chans: channels of the image.
        deep_supervision: return the logits of all of ``outputs``, the finest first; an attribute that may be changed.
        device, dtype: where and in which type the parameters are made.
    """

    axes = 2
    stride: int | Sequence[int]
    outputs: nn.ModuleList

    def __init__(
        self,
        *,
        num_classes: int = 1,
        in_chans: int = 3,
        deep_supervision: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.num_classes, self.in_chans, self.deep_supervision = num_classes, in_chans, deep_supervision
        self._dd: dict[str, Any] = {"device": device, "dtype": dtype}

    def decode(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, *grid) -> what each of ``outputs`` takes, the coarsest first: (b, c, *grid / s)"""
        raise NotImplementedError

    def initialise(self) -> None:
        """What differs from the modules' own initialisation."""

    def init_weights(self, needs_reset: bool = False) -> None:
        """The initialisation of the original; with ``needs_reset`` every module starts afresh before."""
        if needs_reset:
            reset_parameters(self)
            for module in self.modules():
                if isinstance(module, TimmModel):  # an encoder
                    module.initialise()
        self.initialise()

    def prepare(self, x: Tensor) -> Tensor:
        """Any image that the network takes -> (b, in_chans, *grid)"""
        return x

    def maps(self, x: Tensor) -> list[Tensor]:
        """What :meth:`decode` makes of an image, prepared and checked."""
        return self.decode(check_grid(self.prepare(x), self.in_chans, self.axes, self.stride))

    def logits(self, x: Tensor) -> Tensor:
        """(b, in_chans, *grid) -> (b, num_classes, *grid)"""
        return self.outputs[-1](self.maps(x)[-1])

    def finish(self, logits: Tensor) -> Tensor:
        """What :meth:`forward` returns of logits: themselves."""
        return logits

    def forward(self, x: Tensor) -> "Tensor | list[Tensor]":
        """(b, in_chans, *grid) -> (b, num_classes, *grid); with deep supervision a list of such maps, finest first."""
        if not self.deep_supervision:
            return self.finish(self.logits(x))
        return [self.finish(layer(y)) for layer, y in zip(self.outputs, self.maps(x), strict=True)][::-1]


@register_notrace_function
def check_grid(x: Tensor, channels: int, axes: int, stride: int | Sequence[int]) -> Tensor:
    """``x``, if it is (b, channels, *grid) with ``axes`` sides that are multiples of ``stride``.

    Raises:
        ValueError: it is not; the message says what came and what would do.
    """
    shape = tuple(x.shape)
    if len(shape) != axes + 2:
        advice = "; x[None] makes a batch of one" if len(shape) == axes + 1 else ""
        raise ValueError(f"images must be (batch, {channels}, {SIDES[axes]}), got the shape {shape}{advice}")
    if shape[1] != channels:
        advice = f"make the network with in_chans={shape[1]}"
        raise ValueError(f"images must have {channels} channels, got {shape[1]} in the shape {shape}; {advice}")
    strides = (stride,) * axes if isinstance(stride, int) else tuple(stride)
    if any(side % s or not side for side, s in zip(shape[2:], strides, strict=True)):
        wanted = f"{strides[0]}" if len(set(strides)) == 1 else ", ".join(map(str, strides))
        names = SIDES[axes].replace(", ", " and ") if axes == 2 else SIDES[axes]
        raise ValueError(f"{names} must be multiples of {wanted}, got {shape[2:]}; pad the image")
    return x


def grey_to(x: Tensor, channels: int) -> Tensor:
    """Images of one channel repeated to ``channels``; others as they are."""
    return x.expand(-1, channels, -1, -1) if x.ndim == 4 and x.shape[1] == 1 else x


def pyramid(encoder: "str | nn.Module", in_chans: int, **dd: Any) -> nn.Module:
    """The module (b, in_chans, h, w) -> [(b, c_i, h / s_i, w / s_i), ...] that an ``encoder`` stands for.

    Args:
        encoder: the name of a backbone of the zoo, with or without ``_backbone``; a backbone, which is changed; or a
            module with ``channels`` c_i and ``strides`` s_i, each stride a multiple of the one before.
        in_chans: channels of the image, of an encoder that is given by name.
        **dd: device and dtype, likewise.

    Raises:
        ValueError: there is no such backbone, or the module is no pyramid.
    """
    if isinstance(encoder, str):
        encoder = create_model(f"{encoder.removesuffix('_backbone')}_backbone", in_chans=in_chans, **dd)
    elif isinstance(encoder, TimmModel):
        encoder = pyramid_of(type(encoder))(cast(Any, encoder))
    strides = getattr(encoder, "strides", ())
    if not strides or not getattr(encoder, "channels", ()) or any(b % a for a, b in pairwise(strides)):
        name = type(encoder).__name__
        raise ValueError(
            f"an encoder has channels and strides, each a multiple of the one before; got {name} {strides}"
        )
    return encoder


def pyramid_maps(encoder: nn.Module, x: Tensor, grid: Sequence[int]) -> list[Tensor]:
    """The encoder's maps of ``x``, (b, c_i, h / s_i, w / s_i) for the image's ``grid`` (h, w).

    Maps of another size, as overlapping patches give them, are resized.
    """
    sizes = [tuple(side // s for side in grid) for s in cast(Any, encoder).strides]
    maps = zip(encoder(x), sizes, strict=True)
    return [y if y.shape[2:] == size else F.interpolate(y, size=size, mode="bilinear") for y, size in maps]


def load_encoder(model: nn.Module, source: "str | Path | Mapping", *, own: str = "$^") -> LoadReport:
    """Load the weights of a classifier into a network's ``encoder``, a pyramid of the classifier's kind.

    Args:
        model: the network.
        source: a checkpoint in any layout that :func:`vmamba.load_checkpoint` takes.
        own: names of the encoder that keep their values, as a regular expression, beside norms of its outputs.

    Returns:
        What was loaded, by the encoder's names; ``missing`` lists what keeps its values.

    Raises:
        FileNotFoundError: no such file; ValueError: other tensors are missing, left over or have another shape; nothing
            has been loaded then.
    """
    encoder = cast(nn.Module, model.encoder)
    native, report = fit(source, encoder)
    kept, dropped = re.compile(rf"norms\.|neck\.|{own}"), re.compile(rf"(body\.)?(norm|head)\.|{own}")
    wrong = [name for name in (*report.missing, *report.misshapen) if not kept.match(name)]
    wrong += [name for name in report.unexpected if not dropped.match(name)]
    if wrong:
        raise ValueError(f"these are not the weights of a classifier with this encoder: {', '.join(wrong[:8])}")
    fitting = {name: native[name] for name in report.loaded if not kept.match(name)}
    return load_checkpoint(encoder, fitting, strict=False)

"""U-Mamba (arXiv:2401.04722), for images and for volumes. Code: bowang-lab/U-Mamba, Apache-2.0.

nnU-Net's residual U-Net with Mamba layers, whose results take the maps' place: after the deepest stage (Bot) or after
several stages of the encoder (Enc). Two generations of the code exist, of 9 January 2024 (``V1``, the preprint's
figures) and of 27 March 2024 (``V2``); weights of one do not fit the other.
"""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.kernels.instance_norm import is_channels_last
from vmamba.norm_act import Chain, laid_out
from vmamba.precision import autocasts
from vmamba.registry import register
from vmamba.segmentor import Segmentor
from vmamba.unet_blocks import (
    LAYERS,
    MAMBA,
    MAMBA_KEYS,
    SLOPE,
    ConvResidual,
    MambaLayer,
    Size,
    init_conv,
    instance_norm,
    same,
)


def pooled(axes: int, dim: int, out_dim: int, kernel: Size, stride: Size, **dd: Any) -> ConvResidual:
    """A residual block whose shortcut is pooled and, where the channels change, a 1x1 convolution with a norm."""
    norm, steps = partial(instance_norm, axes), {stride} if isinstance(stride, int) else set(stride)
    pool = nn.Identity() if steps == {1} else LAYERS[axes].avg_pool(stride, stride)
    change = [LAYERS[axes].conv(dim, out_dim, 1, bias=False, **dd), norm(out_dim, **dd)] if dim != out_dim else []
    return ConvResidual(
        axes, dim, out_dim, kernel=kernel, stride=stride, norm=norm, shortcut=Chain(pool, *change), **dd
    )


def projected(axes: int, dim: int, out_dim: int, kernel: Size, stride: Size, **dd: Any) -> ConvResidual:
    """A residual block whose shortcut is a 1x1 convolution."""
    shortcut = LAYERS[axes].conv(dim, out_dim, 1, stride, **dd)
    norm = partial(instance_norm, axes)
    return ConvResidual(axes, dim, out_dim, kernel=kernel, stride=stride, norm=norm, shortcut=shortcut, **dd)


def level(
    first: Callable[..., nn.Module],
    axes: int,
    dim: int,
    out_dim: int,
    kernel: Size,
    stride: Size,
    depth: int,
    **dd: Any,
) -> nn.Sequential:
    """``depth`` residual blocks, of which the ``first`` changes size and channels."""
    rest = [pooled(axes, out_dim, out_dim, kernel, 1, **dd) for _ in range(depth - 1)]
    return nn.Sequential(first(axes, dim, out_dim, kernel, stride, **dd), *rest)


def single(axes: int, dim: int, out_dim: int, kernel: Size, stride: Size, depth: int, **dd: Any) -> nn.Sequential:
    """One convolution, norm and activation, whatever ``depth``."""
    conv = LAYERS[axes].conv(dim, out_dim, kernel, stride, same(kernel), **dd)
    return Chain(conv, instance_norm(axes, out_dim, **dd), nn.LeakyReLU(SLOPE))


class Nearest(nn.Sequential):
    """Pixels repeated, then a 1x1 convolution: computed in the other order, on fewer pixels and in its type."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, dim, *grid) -> (b, out_dim, *grid * stride)"""
        repeat, conv = self
        x = conv(input)
        kind = x.device.type if isinstance(x, Tensor) else ""
        if kind and x.ndim == 5 and is_channels_last(x):  # which PyTorch would lay out anew
            return _repeated(x, [int(factor) for factor in cast(Any, repeat).scale_factor])
        with torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext():  # which widens what it repeats
            return repeat(x)


def _repeated(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Each pixel of a channels-last volume (b, c, d, h, w) so many times in each direction."""
    b, c, *grid = x.shape
    pairs = [n for pair in zip(grid, factors, strict=True) for n in pair]
    rows = x.movedim(1, -1)[:, :, None, :, None, :, None].expand(b, *pairs, c)
    return rows.reshape(b, *(n * f for n, f in zip(grid, factors, strict=True)), c).movedim(-1, 1)


def nearest(axes: int, dim: int, out_dim: int, stride: Size, **dd: Any) -> nn.Module:
    """A :class:`Nearest` that repeats pixels ``stride`` times."""
    factors = tuple(float(s) for s in (stride if isinstance(stride, Sequence) else (stride,) * axes))
    return Nearest(nn.Upsample(scale_factor=factors), LAYERS[axes].conv(dim, out_dim, 1, **dd))


def transposed(axes: int, dim: int, out_dim: int, stride: Size, **dd: Any) -> nn.Module:
    """A transposed convolution that spreads each pixel over ``stride`` pixels."""
    return LAYERS[axes].up(dim, out_dim, stride, stride, **dd)


class Generation(NamedTuple):
    """What differs between the two versions of the code.

    ``stem`` and ``stage`` build blocks at the finest and at each level, ``up`` what makes a map finer; ``depths(n)``
    gives the blocks of n encoder and n - 1 decoder levels. ``unskipped``: the number of sides of the grids whose finest
    map does not go to the decoder.
    """

    stem: Callable[..., nn.Module]
    stage: Callable[..., nn.Module]
    up: Callable[..., nn.Module]
    depths: Callable[[int], tuple[list[int], list[int]]]
    unskipped: Collection[int]


def halved(n: int) -> tuple[list[int], list[int]]:
    """Two blocks in the first half of the levels, one in the second."""
    blocks = [2 if s < math.ceil(n / 2) else 1 for s in range(n)]
    return blocks, blocks[:-1]


def twos(n: int) -> tuple[list[int], list[int]]:
    """Two blocks everywhere."""
    return [2] * n, [2] * (n - 1)


V1 = Generation(single, partial(level, pooled), transposed, twos, ())
V2 = Generation(partial(level, projected), partial(level, projected), nearest, halved, (2,))


def deepest(n: int) -> list[int]:
    """The last of n stages (Bot)."""
    return [n - 1]


def every(n: int) -> list[int]:
    """All n stages (Enc, volumes; all of V1)."""
    return list(range(n))


def alternate(n: int) -> list[int]:
    """Every second stage, the last among them (Enc, images)."""
    return list(range(n - 1, -1, -2))[::-1]


class ChannelMamba(MambaLayer):
    """A norm and Mamba over the channels, each a token of all its pixels: (b, c, *grid) of ``dim`` pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *grid) -> (b, c, *grid)"""
        pixels, made = x.flatten(2), self.norm.normalized_shape[0]
        if pixels.shape[2] != made:
            raise ValueError(
                f"a layer over channels was made for {made} pixels, got {pixels.shape[2]} in {tuple(x.shape[2:])}; "
                "give images of the size patch, or make the network with another patch"
            )
        return super().forward(pixels.mT).mT.reshape(x.shape)


register_notrace_module(ChannelMamba)


def zero_last_norm(module: nn.Module) -> None:
    """Residual blocks start as their shortcuts; for ``model.apply``."""
    if isinstance(module, ConvResidual):
        nn.init.zeros_(module.norm2.weight)  # pyright: ignore[reportArgumentType]


class UMamba(Segmentor):
    """Image (b, in_chans, *grid), its sides multiples of the strides' products, -> logits (b, num_classes, *grid).

    With ``deep_supervision`` the logits of all decoder levels. The deepest map must have more than one pixel.

    Args:
        features: channels of each stage.
        strides: of each stage, a number for each side of the grid; the first ones are 1.
        kernels: sizes of the convolutions of each stage; 3 by default.
        generation: the version of the code, :data:`V1` or :data:`V2`.
        mamba: after which of n stages there are Mamba layers, ``mamba(n)``: :func:`deepest`, :func:`every` or
            :func:`alternate`.
        patch: size of the images. Where a stage's map then has no more pixels than channels, its Mamba layer takes the
            channels as its sequence, and images must have this size (Enc of V2). None: layers over pixels alone.
        scan: the order in which the layers over pixels read the map.
        init: functions for ``model.apply`` that initialise the weights.
        **segmentor: ``num_classes``, ``in_chans``, ``deep_supervision``, ``device``, ``dtype`` of :class:`Segmentor`.

    Raises:
        ValueError: there are not as many strides or kernels as features.
    """

    def __init__(
        self,
        *,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Size] | None = None,
        generation: Generation = V2,
        mamba: Callable[[int], Collection[int]] = deepest,
        patch: Sequence[int] | None = None,
        scan: Any = "raster",
        init: Sequence[Callable[[nn.Module], None]] = (init_conv,),
        **segmentor,
    ):
        super().__init__(**segmentor)
        n, dd = len(features), self._dd
        kernels = [3] * n if kernels is None else [k if isinstance(k, int) else tuple(k) for k in kernels]
        strides = [tuple(stride) for stride in strides]
        if not len(strides) == len(kernels) == n:
            raise ValueError(f"{n} features need as many strides and kernels, got {len(strides)} and {len(kernels)}")
        self.axes, self.init = len(strides[0]), init
        self.stride = tuple(math.prod(side) for side in zip(*strides, strict=True))
        self.unskipped = self.axes in generation.unskipped
        depths, depths_decoder = generation.depths(n)
        self.stem = generation.stem(self.axes, self.in_chans, features[0], kernels[0], 1, depths[0], **dd)
        self.stages, self.mamba, self.up, self.decoder, self.outputs = (nn.ModuleList() for _ in range(5))
        side, places = patch, mamba(n)
        for s, (dim, out) in enumerate(zip([features[0], *features], features, strict=False)):
            self.stages.append(generation.stage(self.axes, dim, out, kernels[s], strides[s], depths[s], **dd))
            side = None if side is None else [a // b for a, b in zip(side, strides[s], strict=True)]
            pixels = math.inf if side is None else math.prod(side)
            self.mamba.append(self._layer(out, pixels, scan) if s in places else nn.Identity())
        for s, depth in zip(range(n - 1, 0, -1), depths_decoder, strict=True):
            dim, kernel, both = features[s - 1], kernels[s - 1], 1 if s == 1 and self.unskipped else 2
            self.up.append(generation.up(self.axes, features[s], dim, strides[s], **dd))
            self.decoder.append(generation.stage(self.axes, both * dim, dim, kernel, 1, depth, **dd))
            self.outputs.append(LAYERS[self.axes].conv(dim, self.num_classes, 1, **dd))
        self.init_weights()

    def _layer(self, dim: int, pixels: float, scan: Any) -> MambaLayer:
        if pixels <= dim:
            return ChannelMamba(int(pixels), **self._dd)
        return MambaLayer(dim, mixer=partial(MAMBA, scan=scan), **self._dd)

    def initialise(self) -> None:
        """The functions ``init``."""
        for init in self.init:
            self.apply(init)

    def decode(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, *grid) -> (b, c, *grid / s) of each decoder level, the coarsest first"""
        x, skips, maps = self.stem(laid_out(x)), [], []
        for stage, layer in zip(self.stages, self.mamba, strict=True):
            x = layer(stage(x))
            skips.append(x)
        skips = [None, *skips[1:]] if self.unskipped else skips
        x = skips.pop()
        for up, stage in zip(self.up, self.decoder, strict=True):
            x, skip = up(x), skips.pop()
            x = stage(x if skip is None else torch.cat([x, skip], 1))
            maps.append(x)
        return maps


ABDOMEN_MR = dict(features=(32, 64, 128, 256, 512, 512, 512), strides=((1, 1), *((2, 2),) * 6))
ABDOMEN_CT = dict(
    features=(32, 64, 128, 256, 320, 320),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
    kernels=((1, 3, 3), *((3, 3, 3),) * 5),
)
PATCHES = {2: (320, 320), 3: (40, 224, 192)}
COMMON = dict(num_classes=14, in_chans=1)
V1_ENC: dict[str, Any] = dict(generation=V1, mamba=every, init=(init_conv, zero_last_norm))
VARIANTS: dict[str, dict[str, Any]] = {  # nnU-Net's plans of the data sets 702 (2D) and 701 (3D)
    "umamba_bot_2d": dict(**ABDOMEN_MR, **COMMON),
    "umamba_enc_2d": dict(**ABDOMEN_MR, **COMMON, mamba=alternate, patch=PATCHES[2]),
    "umamba_bot_3d": dict(**ABDOMEN_CT, **COMMON),
    "umamba_enc_3d": dict(**ABDOMEN_CT, **COMMON, mamba=every, patch=PATCHES[3]),
    "umamba_v1_bot_2d": dict(**ABDOMEN_MR, **COMMON, generation=V1),
    "umamba_v1_enc_2d": dict(**ABDOMEN_MR, **COMMON, **V1_ENC),
    "umamba_v1_bot_3d": dict(**ABDOMEN_CT, **COMMON, generation=V1),
    "umamba_v1_enc_3d": dict(**ABDOMEN_CT, **COMMON, **V1_ENC),
}

BOTTLENECKS = tuple(f"mamba.{stage}." for stage in range(12))
KEYS = [
    (r"^decoder\.encoder\..*$", ""),  # second copies
    (r"^.*\.all_modules\..*$", ""),
    (r"^mamba\.", tuple(f"{layer}mixer." for layer in BOTTLENECKS)),
    (r"^ln\.", tuple(f"{layer}norm." for layer in BOTTLENECKS)),
    (r"^mamba_layer\.", BOTTLENECKS),
    (r"^encoder\.mamba_layers\.", "mamba."),
    (r"^(mamba\.\d+\.)mamba\.", r"\1mixer."),
    *MAMBA_KEYS,
    (r"^encoder\.stem\.convs\.0\.conv\.", "stem.0."),
    (r"^encoder\.stem\.convs\.0\.norm\.", "stem.1."),
    (r"^encoder\.", ""),
    (r"^decoder\.(?:upsample_layers|transpconvs)\.(\d+)\.(?:conv\.)?", (r"up.\1.", r"up.\1.1.")),
    (r"^decoder\.seg_layers\.", "outputs."),
    (r"^decoder\.stages\.", "decoder."),
    (r"\.blocks\.", "."),
    (r"\.skip\.\d\.conv\.", ".shortcut.1."),
    (r"\.skip\.\d\.norm\.", ".shortcut.2."),
    (r"\.conv3\.", ".shortcut."),
    (r"\.conv([12])\.norm\.", r".norm\1."),
    (r"\.conv([12])\.conv\.", r".conv\1."),
]

register(
    UMamba,
    VARIANTS,
    keys=KEYS,
    paper="2401.04722",
    origin="https://github.com/bowang-lab/U-Mamba",
    license="apache-2.0",
    sides={name: PATCHES[len(settings["strides"][0])] for name, settings in VARIANTS.items()},
)

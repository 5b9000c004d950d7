"""MSVM-UNet (arXiv:2408.13735). Original code: gndlwch2w/msvm-unet, which has no licence: written from the description.

VMamba of the second generation as the encoder; a decoder of VMamba blocks whose MLPs convolve at several scales, with
convolutions before each patch expansion.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from timm.layers import Mlp
from torch import Tensor, nn

from vmamba.block import Block, Conv2d
from vmamba.checkpoint import LoadReport
from vmamba.decoder import Fusion, falling_rates, spread
from vmamba.models.vmamba import BLOCK_KEYS, S1, VMamba
from vmamba.norm import LayerNorm
from vmamba.pyramid import Pyramid
from vmamba.registry import register
from vmamba.segmentor import Segmentor, grey_to, load_encoder, pyramid, pyramid_maps


class MultiScaleConv(nn.Module):
    """x and its depthwise convolutions of sizes 1, 3 and 5, summed: (b, h, w, c) -> (b, h, w, c)."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.convs = nn.ModuleList(
            Conv2d(dim, dim, size, padding=size // 2, groups=dim, bias=False, **dd) for size in (1, 3, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return x + sum(conv(x) for conv in self.convs)


class MultiScaleBlock(Block):
    """A block whose MLP has a :class:`MultiScaleConv` behind its activation; the arguments of :class:`Block`."""

    def __init__(self, dim: int, *, device=None, dtype=None, **block):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, **block, **dd)
        self.mlp = Mlp(dim, 4 * dim, norm_layer=MultiScaleConv, **dd)


class ConvExpand(nn.Module):
    """(b, h, w, c) -> (b, scale h, scale w, out_dim): convolutions, each pixel's channels as a patch, a norm."""

    def __init__(self, dim: int, out_dim: int, scale: int = 2, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide, self.scale = scale * scale * out_dim, scale
        self.expand = nn.Sequential(
            nn.Conv2d(dim, wide, 1, **dd),
            nn.BatchNorm2d(wide, **dd),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, **dd),
        )
        self.norm = LayerNorm(out_dim, wide=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, scale h, scale w, out_dim)"""
        y = self.expand(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(spread(y, self.scale))


class MSVMUNet(Segmentor):
    """Image (b, in_chans, h, w), h and w multiples of 32, -> logits (b, num_classes, h, w).

    Where ``in_chans`` is 3, an image of one channel is repeated to three.

    Args:
        encoder: what takes the place of the published encoder: the name of a backbone of the zoo, or what else
            :func:`vmamba.segmentor.pyramid` takes. ``dim``, ``depths`` and ``drop_path_rate`` then mean nothing.
        dim: channels of the encoder's first stage.
        depths: blocks per stage of the encoder.
        depths_decoder: blocks per stage of the decoder, in the order in which they run.
        drop_path_rate: stochastic depth of the encoder's last block.
        drop_path_rate_decoder: stochastic depth of the decoder's first block.
        scan: the order in which the mixers read the map.
        **segmentor: ``num_classes``, ``in_chans``, ``device``, ``dtype`` of :class:`Segmentor`.

    Raises:
        ValueError: there is not one decoder stage less than the encoder has maps.
    """

    def __init__(
        self,
        *,
        encoder: "str | nn.Module | None" = None,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        depths_decoder: Sequence[int] = (2, 2, 2),
        drop_path_rate: float = 0.2,
        drop_path_rate_decoder: float = 0.2,
        scan: Any = "cross",
        **segmentor,
    ):
        super().__init__(**segmentor)
        dd = self._dd
        if encoder is None:
            settings: dict[str, Any] = {**S1, "in_chans": self.in_chans, "drop_path_rate": drop_path_rate}
            encoder = Pyramid(VMamba(depths=depths, dim=dim, scan=scan, **settings, **dd), norm=False)
        self.encoder = pyramid(encoder, self.in_chans, **dd)
        channels, strides = cast(Any, self.encoder).channels, cast(Any, self.encoder).strides
        if len(depths_decoder) != len(channels) - 1:
            raise ValueError(
                f"{len(channels)} maps take {len(channels) - 1} decoder stages, got {tuple(depths_decoder)}"
            )
        self.stride = strides[-1]
        block = partial(MultiScaleBlock, mixer=partial(S1["mixer"], scan=scan), **dd)
        rates = falling_rates(drop_path_rate_decoder, depths_decoder)
        levels = list(zip(channels, strides, strict=True))[::-1]
        self.decoder = nn.ModuleList(
            Fusion(c, out, s // t, [block(out, drop_path=rate) for rate in row], expand=ConvExpand, **dd)
            for ((c, s), (out, t)), row in zip(pairwise(levels), rates, strict=True)
        )
        self.last = ConvExpand(channels[0], channels[0], strides[0], **dd)
        self.outputs = nn.ModuleList([nn.Conv2d(channels[0], self.num_classes, 1, **dd)])

    def decode(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) -> [(b, c, h, w)]"""
        skips = [y.permute(0, 2, 3, 1) for y in pyramid_maps(self.encoder, x, x.shape[2:])]
        y = skips.pop()
        for stage in self.decoder:
            y = stage(y, skips.pop())
        return [self.last(y).permute(0, 3, 1, 2)]

    def prepare(self, x: Tensor) -> Tensor:
        """(b, in_chans or 1, h, w) -> (b, in_chans, h, w)"""
        return grey_to(x, self.in_chans)


def load_imagenet(model: MSVMUNet, source: "str | Path | Mapping") -> LoadReport:
    """Start from the ImageNet weights of the encoder (the published networks: ``vmamba_tiny_s1l8``, ``..small_s1l20``).

    Args:
        model: the network to fill.
        source: a checkpoint of the encoder's classifier in any layout that :func:`vmamba.load_checkpoint` takes.

    Returns:
        What was loaded, by the encoder's names.

    Raises:
        FileNotFoundError: no such file; ValueError: not such weights; nothing has been loaded then.
    """
    return load_encoder(model, source)


VARIANTS: dict[str, dict[str, Any]] = {  # classes of Synapse
    "msvm_unet_tiny": dict(num_classes=9),
    "msvm_unet_small": dict(num_classes=9, depths=(2, 2, 20, 2), drop_path_rate=0.3),
}

KEYS = [
    (r"^_model\.", ""),
    (r"^encoder\.layer0\.0\.", "encoder.body.stem.conv1."),
    (r"^encoder\.layer0\.2\.", "encoder.body.stem.norm1."),
    (r"^encoder\.layer1\.0\.", "encoder.body.stem.conv2."),
    (r"^encoder\.layer1\.2\.", "encoder.body.stem.norm2."),
    (r"^encoder\.downsamples\.(\d+)\.1\.", lambda m: f"encoder.body.stages.{int(m[1]) + 1}.downsample.conv."),
    (r"^encoder\.downsamples\.(\d+)\.3\.", lambda m: f"encoder.body.stages.{int(m[1]) + 1}.downsample.norm."),
    (r"^encoder\.layers\.", "encoder.body.stages."),
    (r"^decoder\.out_layers\.0\.out\.", "outputs.0."),
    (r"^decoder\.out_layers\.0\.", "last."),
    (r"^decoder\.layers\.(\d+)\.up\.", r"decoder.\1.expand."),
    (r"^decoder\.layers\.(\d+)\.concat_layer\.", r"decoder.\1.reduce."),
    (r"^decoder\.layers\.(\d+)\.vss_layer\.", r"decoder.\1."),
    (r"\.multiscale_conv\.dw_convs\.", ".norm.convs."),
    *BLOCK_KEYS,
]

register(
    MSVMUNet,
    VARIANTS,
    keys=KEYS,
    paper="2408.13735",
    origin="https://github.com/gndlwch2w/msvm-unet",
    license="none stated",
)

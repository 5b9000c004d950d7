"""Swin-UMamba and Swin-UMamba-D (arXiv:2402.03302, MICCAI 2024). Code: JiarunLiu/Swin-UMamba, Apache-2.0.

A VMamba that was trained on ImageNet as the encoder of a U-Net: with convolutional skips and decoder behind a stem of
stride 2 (Swin-UMamba), or with VMamba blocks in the decoder too (Swin-UMamba-D, "dagger").
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from vmamba.block import Block, PatchStem, init_linear
from vmamba.checkpoint import LoadReport
from vmamba.decoder import Fusion, PatchExpand, falling_rates
from vmamba.mixers.ss2d import SS2D
from vmamba.models.vmamba import BLOCK_KEYS, VANILLA, VMamba
from vmamba.norm_act import Chain, laid_out
from vmamba.pyramid import Pyramid
from vmamba.registry import register
from vmamba.segmentor import Segmentor, load_encoder, pyramid, pyramid_maps
from vmamba.unet_blocks import UnetrBlock, UnetrUp, init_conv, instance_norm


class SwinUMamba(Segmentor):
    """Image (b, in_chans, h, w), h and w multiples of 32, -> logits (b, num_classes, h, w).

    With ``deep_supervision`` logits of (h, w), half, a quarter and an eighth of it.

    Args:
        encoder: what takes the place of the published encoder and reads the image itself: the name of a backbone of
            the zoo, or what else :func:`vmamba.segmentor.pyramid` takes. The settings below then mean nothing.
        dim: channels of the encoder's first stage.
        depths: blocks per stage of the encoder.
        drop_path_rate: stochastic depth of its last block.
        scan: the order in which its mixers read the map.
        **segmentor: ``num_classes``, ``in_chans``, ``deep_supervision``, ``device``, ``dtype`` of :class:`Segmentor`.
    """

    def __init__(
        self,
        *,
        encoder: "str | nn.Module | None" = None,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        drop_path_rate: float = 0.2,
        scan: Any = "cross",
        **segmentor,
    ):
        super().__init__(**segmentor)
        dd, self.published = self._dd, encoder is None
        if encoder is None:
            settings: dict[str, Any] = {**VANILLA, "stem": partial(PatchStem, patch=2), "in_chans": dim // 2}
            body = VMamba(depths=depths, dim=dim, scan=scan, drop_path_rate=drop_path_rate, **settings, **dd)
            encoder = Pyramid(body, norm=False)
        self.encoder = pyramid(encoder, self.in_chans, **dd)
        maps, strides = cast(Any, self.encoder).channels, [1, 2, *cast(Any, self.encoder).strides]
        channels = [maps[0] // 2, *maps]
        self.stride = strides[-1]
        self.stem = Chain(nn.Conv2d(self.in_chans, channels[0], 7, 2, 3, **dd), instance_norm(2, channels[0], **dd))
        self.skips = nn.ModuleList(UnetrBlock(2, c, out, **dd) for c, out in pairwise([self.in_chans, *channels]))
        scales = [b // a for a, b in pairwise(strides)]
        rises = zip([channels[-1], *channels[:0:-1]], channels[::-1], scales[::-1], strict=True)
        self.decoder = nn.ModuleList(UnetrUp(2, c, out, scale, **dd) for c, out, scale in rises)
        self.last = UnetrBlock(2, channels[0], channels[0], **dd)
        self.outputs = nn.ModuleList(nn.Conv2d(c, self.num_classes, 1, **dd) for c in channels[-2::-1])

    def decode(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) -> (b, c, h / s, w / s) of all decoder levels but the first, the coarsest first"""
        x = laid_out(x)
        half = self.stem(x)
        maps = [x, half, *map(laid_out, pyramid_maps(self.encoder, half if self.published else x, x.shape[2:]))]
        skips = [skip(y) for skip, y in zip(self.skips, maps, strict=False)]
        y, results = maps[-1], []
        for up in self.decoder:
            y = up(y, skips.pop())
            results.append(y)
        return [*results[1:-1], self.last(results[-1])]


class SwinUMambaD(Segmentor):
    """Image (b, in_chans, h, w), h and w multiples of 32, -> logits (b, num_classes, h, w).

    With ``deep_supervision`` logits of (h, w), a quarter, an eighth and a sixteenth of it.

    Args:
        encoder, dim, depths, scan: as of :class:`SwinUMamba`.
        depth_decoder: blocks per decoder stage.
        drop_path_rate: stochastic depth of the last encoder and the first decoder block.
        **segmentor: ``num_classes``, ``in_chans``, ``deep_supervision``, ``device``, ``dtype`` of :class:`Segmentor`.
    """

    def __init__(
        self,
        *,
        encoder: "str | nn.Module | None" = None,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        depth_decoder: int = 2,
        drop_path_rate: float = 0.2,
        scan: Any = "cross",
        **segmentor,
    ):
        super().__init__(**segmentor)
        dd, self.published = self._dd, encoder is None
        if encoder is None:
            settings: dict[str, Any] = {**VANILLA, "in_chans": self.in_chans, "drop_path_rate": drop_path_rate}
            encoder = Pyramid(VMamba(depths=depths, dim=dim, scan=scan, **settings, **dd), norm=False)
        self.encoder = pyramid(encoder, self.in_chans, **dd)
        channels, strides = cast(Any, self.encoder).channels, cast(Any, self.encoder).strides
        self.stride = strides[-1]
        block = partial(Block, mixer=partial(SS2D, scan=scan), mlp_ratio=0.0, **dd)
        rates = falling_rates(drop_path_rate, (depth_decoder,) * (len(channels) - 1))
        levels = list(zip(channels, strides, strict=True))[::-1]
        self.decoder = nn.ModuleList(
            Fusion(c, out, s // t, [block(out, drop_path=rate) for rate in row], **dd)
            for ((c, s), (out, t)), row in zip(pairwise(levels), rates, strict=True)
        )
        self.last = PatchExpand(channels[0], channels[0], strides[0], **dd)
        self.outputs = nn.ModuleList(nn.Conv2d(c, self.num_classes, 1, **dd) for c in (*channels[-2::-1], channels[0]))
        self.init_weights()

    def initialise(self) -> None:
        """Truncated normal (0.02) for linear layers, He's for convolutions; an encoder that was given keeps its own.

        The bias of the stem keeps its values too, unlike in the original. With biases of zero everywhere an empty patch
        (nnU-Net makes the surroundings of a brain exactly 0) stays zero through all layers, and each LayerNorm on the
        way back multiplies its gradient by one over the root of eps, 316: it is infinite before the stem.
        """
        self.decoder.apply(init_linear)
        self.last.apply(init_linear)
        if not self.published:
            self.decoder.apply(init_conv)
            self.outputs.apply(init_conv)
            return
        bias = cast(Any, self.encoder).body.stem.conv1.bias
        kept = bias.detach().clone()
        self.apply(init_conv)
        bias.data.copy_(kept)

    def decode(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) -> (b, c, h / s, w / s) of the decoder's stages and the full map, the coarsest first"""
        skips = [y.permute(0, 2, 3, 1) for y in pyramid_maps(self.encoder, x, x.shape[2:])]
        y, maps = skips.pop(), []
        for stage in self.decoder:
            y = stage(y, skips.pop())
            maps.append(y)
        return [y.permute(0, 3, 1, 2) for y in (*maps, self.last(y))]


def load_imagenet(model: "SwinUMamba | SwinUMambaD", source: "str | Path | Mapping") -> LoadReport:
    """Start from the ImageNet weights of a vanilla VMamba (the published networks: ``vanilla_vmamba_tiny``).

    As published, the stem keeps its values where it differs: that of Swin-UMamba takes the bias of the norm alone, that
    of Swin-UMamba-D everything for images of three channels and else nothing. An encoder that was given takes all.

    Args:
        model: the network to fill.
        source: a checkpoint of the encoder's classifier in any layout that :func:`vmamba.load_checkpoint` takes.

    Returns:
        What was loaded, by the encoder's names; ``missing`` lists what keeps its values.

    Raises:
        FileNotFoundError: no such file; ValueError: not such weights; nothing has been loaded then.
    """
    kept = r"body\.stem\.(conv1|norm1\.weight)" if isinstance(model, SwinUMamba) else r"body\.stem\."
    takes_all = not model.published or (isinstance(model, SwinUMambaD) and model.in_chans == 3)
    return load_encoder(model, source, own="$^" if takes_all else kept)


COMMON = dict(num_classes=14, in_chans=1)  # abdomen MR
ENCODER_KEYS = [
    (r"^vssm_encoder\.patch_embed\.proj\.", "encoder.body.stem.conv1."),
    (r"^vssm_encoder\.patch_embed\.norm\.", "encoder.body.stem.norm1."),
    (r"^vssm_encoder\.downsamples\.(\d+)\.", lambda m: f"encoder.body.stages.{int(m[1]) + 1}.downsample."),
    (r"^vssm_encoder\.layers\.", "encoder.body.stages."),
]
KEYS = [
    *ENCODER_KEYS,
    (r"^encoder(\d)\.layer\.", lambda m: f"skips.{int(m[1]) - 1}."),
    (r"^decoder([2-6])\.", lambda m: f"decoder.{6 - int(m[1])}."),
    (r"^decoder1\.layer\.", "last."),
    (r"\.transp_conv\.conv\.", ".up."),
    (r"\.conv_block\.", ".block."),
    (r"\.conv3\.conv\.", ".shortcut.0."),
    (r"\.conv([12])\.conv\.", r".conv\1."),
    (r"^out_layers\.(\d)\.conv\.conv\.", lambda m: f"outputs.{3 - int(m[1])}."),
    *BLOCK_KEYS,
]
KEYS_D = [
    *ENCODER_KEYS,
    (r"^decoder\.expand_layers\.(\d+)\.", (r"decoder.\1.expand.", "last.")),
    (r"^decoder\.concat_back_dim\.(\d+)\.", r"decoder.\1.reduce."),
    (r"^decoder\.stages\.", "decoder."),
    (r"^decoder\.seg_layers\.", "outputs."),
    *BLOCK_KEYS,
]

ABOUT: dict[str, Any] = dict(
    paper="2402.03302", origin="https://github.com/JiarunLiu/Swin-UMamba", license="apache-2.0"
)
register(SwinUMamba, {"swin_umamba": COMMON}, keys=KEYS, **ABOUT, sides={"swin_umamba": (320, 320)})
register(SwinUMambaD, {"swin_umamba_d": COMMON}, keys=KEYS_D, **ABOUT, sides={"swin_umamba_d": (320, 320)})

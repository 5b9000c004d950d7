"""VM-UNet (Vision Mamba UNet for Medical Image Segmentation, arXiv:2402.02491). Code: JCruan519/VM-UNet, Apache-2.0.

A U-Net of gated VMamba blocks: patch merging down, patch expanding up, additive skips. A decoder stage adds the input
of the encoder stage at the resolution it starts from, before it expands: this is how the published weights are wired.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from vmamba.backbone import Stage
from vmamba.block import Block, PatchMerging, PatchStem, drop_path_rates, init_linear
from vmamba.checkpoint import LoadReport, convert, fit, load_checkpoint, read
from vmamba.decoder import PatchExpand, falling_rates
from vmamba.mixers.ss2d import SS2D
from vmamba.models.vmamba import BLOCK_KEYS, VANILLA, VMamba
from vmamba.registry import register
from vmamba.segmentor import Segmentor, grey_to, pyramid, pyramid_maps


class VMUNet(Segmentor):
    """Image (b, in_chans, h, w), h and w multiples of 32, -> map (b, num_classes, h, w).

    One class gives probabilities (the published network ends in a sigmoid), several give logits. Where ``in_chans`` is
    3, an image of one channel is repeated to three.

    Args:
        encoder: what takes the place of the published encoder: the name of a backbone of the zoo, or what else
            :func:`vmamba.segmentor.pyramid` takes. Its maps are added to the decoder; ``dims`` and ``depths`` then
            mean nothing.
        dims: channels of the four encoder stages.
        depths, depths_decoder: blocks per stage, in the order in which they run.
        mixer: builds a block's mixer, ``mixer(dim, scan=..., device=..., dtype=...)``.
        drop_path_rate: stochastic depth of the last encoder and the first decoder block.
        scan: the order in which the mixers read the map.
        **segmentor: ``num_classes``, ``in_chans``, ``device``, ``dtype`` of :class:`Segmentor`.

    Raises:
        ValueError: channels do not double from stage to stage, or there are not as many decoder stages as maps.
    """

    stem: PatchStem | None

    def __init__(
        self,
        *,
        encoder: "str | nn.Module | None" = None,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        depths_decoder: Sequence[int] = (2, 2, 2, 1),
        mixer: Callable[..., nn.Module] = SS2D,
        drop_path_rate: float = 0.2,
        scan: Any = "cross",
        **segmentor,
    ):
        super().__init__(**segmentor)
        dd = self._dd
        block = partial(Block, mixer=partial(mixer, scan=scan), mlp_ratio=0.0, **dd)
        if encoder is None:
            strides = [4 * 2**i for i in range(len(dims))]
            self.stem, self.encoder = self._published(dims, drop_path_rates(drop_path_rate, depths), block)
        else:
            self.stem, self.encoder = None, pyramid(encoder, self.in_chans, **dd)
            dims, strides = cast(Any, self.encoder).channels, cast(Any, self.encoder).strides
        self.stride = strides[-1]
        if len(depths_decoder) != len(dims):
            raise ValueError(
                f"{len(dims)} maps need as many decoder stages, got depths_decoder={tuple(depths_decoder)}"
            )
        levels = list(zip(dims, strides, strict=True))[::-1]
        up = [nn.Identity(), *(PatchExpand(c, out, s // t, **dd) for (c, s), (out, t) in pairwise(levels))]
        rates = falling_rates(drop_path_rate, depths_decoder)
        self.decoder = nn.ModuleList(
            Stage(change, [block(dim, drop_path=rate) for rate in row])
            for change, (dim, _), row in zip(up, levels, rates, strict=True)
        )
        self.final_up = PatchExpand(dims[0], dims[0] // 4, strides[0], **dd)
        self.outputs = nn.ModuleList([nn.Conv2d(dims[0] // 4, self.num_classes, 1, **dd)])
        self.init_weights()

    def _published(self, dims: Sequence[int], rates: list[list[float]], block) -> tuple[PatchStem, nn.ModuleList]:
        if any(b != 2 * a for a, b in pairwise(dims)):
            raise ValueError(f"dims must double from stage to stage, got {tuple(dims)}")
        down = [nn.Identity(), *(PatchMerging(a, b, **self._dd) for a, b in pairwise(dims))]
        stages = [
            Stage(change, [block(dim, drop_path=rate) for rate in row])
            for change, dim, row in zip(down, dims, rates, strict=True)
        ]
        return PatchStem(self.in_chans, dims[0], **self._dd), nn.ModuleList(stages)

    def initialise(self) -> None:
        """Truncated normal (0.02) for linear layers; an encoder that was given keeps its own."""
        for part in (self.encoder if self.stem else nn.Identity(), self.decoder, self.final_up):
            part.apply(init_linear)

    def encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(b, in_chans, h, w) -> the maps that are added to the decoder, finest first, and the one that it starts from.

        The published ones are the inputs of the encoder's stages. All are (b, h / s, w / s, c).
        """
        if self.stem is None:
            maps = [y.permute(0, 2, 3, 1) for y in pyramid_maps(self.encoder, x, x.shape[2:])]
            return maps, maps[-1]
        x, skips = self.stem(x), []
        for stage in cast(Sequence[Stage], self.encoder):
            x = stage.downsample(x)
            skips.append(x)
            x = stage.run(x)
        return skips, x

    def decode(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) -> [(b, c, h, w)]"""
        skips, x = self.encode(x)
        x = self.decoder[0](x)
        for stage in self.decoder[1:]:
            x = stage(x + skips.pop())
        return [self.final_up(x).permute(0, 3, 1, 2)]

    def prepare(self, x: Tensor) -> Tensor:
        """(b, in_chans or 1, h, w) -> (b, in_chans, h, w)"""
        return grey_to(x, self.in_chans)

    def finish(self, logits: Tensor) -> Tensor:
        """Probabilities of one class, logits of several."""
        return logits.sigmoid() if self.num_classes == 1 else logits


def load_imagenet(model: VMUNet, source: "str | Path | Mapping") -> LoadReport:
    """Start from the ImageNet weights of a vanilla VMamba (the published network: ``vanilla_vmamba_small``).

    A stage of VMamba goes to the encoder stage and, without its downsampling, to the decoder stage of its width; blocks
    that VM-UNet does not have are left out, expansions and the last convolution keep their values.

    Args:
        model: the network to fill.
        source: a checkpoint of a vanilla VMamba in any layout that :func:`load_checkpoint` takes.

    Returns:
        What was loaded; ``missing`` lists what keeps its values, ``unexpected`` what was left out.

    Raises:
        FileNotFoundError: no such file; ValueError: not such weights: tensors of the encoder or of the decoder's blocks
            are missing or have other shapes; nothing has been loaded then.
    """
    if model.stem is None:
        raise ValueError("this VM-UNet has another encoder than the published one; load that encoder's weights")
    vanilla = VMamba(depths=(1, 1, 1, 1), dim=model.stem.conv1.out_channels, device="meta", **VANILLA)
    native = convert(source if isinstance(source, Mapping) else read(source), vanilla)
    state, last = {}, len(model.decoder) - 1
    for key, tensor in native.items():
        state[re.sub(r"^stages\.", "encoder.", key)] = tensor
        state[re.sub(r"^stages\.(\d+)\.(?=blocks)", lambda m: f"decoder.{last - int(m[1])}.", key)] = tensor
    _, report = fit(state, model)
    wrong = [*report.misshapen, *(key for key in report.missing if not _OWN.match(key))]
    if wrong:
        raise ValueError(f"these are not the weights of a vanilla VMamba that fits VM-UNet: {', '.join(wrong[:8])}")
    return load_checkpoint(model, state, strict=False)


_OWN = re.compile(r"decoder\.\d+\.downsample\.|final_up\.|outputs\.")  # what VM-UNet has and VMamba has not


VARIANTS = {
    "vmunet": dict(num_classes=1),
    "vmunet_synapse": dict(num_classes=9),
}

KEYS = [
    (r"^vmunet\.", ""),
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.norm\.", "stem.norm1."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"encoder.{int(m[1]) + 1}.downsample."),
    (r"^layers_up\.(\d+)\.upsample\.", r"decoder.\1.downsample."),
    (r"^layers\.", "encoder."),
    (r"^layers_up\.", "decoder."),
    (r"^final_conv\.", "outputs.0."),
    *BLOCK_KEYS,
]

register(
    VMUNet, VARIANTS, keys=KEYS, paper="2402.02491", origin="https://github.com/JCruan519/VM-UNet", license="apache-2.0"
)

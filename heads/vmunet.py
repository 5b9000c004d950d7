"""VM-UNet (Vision Mamba UNet for Medical Image Segmentation, arXiv:2402.02491). Code: JCruan519/VM-UNet, Apache-2.0.

A U-Net of gated VMamba blocks: patch merging down, patch expanding up, additive skips. A decoder stage adds the input
of the encoder stage at the resolution it starts from, before it expands: this is how the published weights are wired.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from vmamba.backbone import Stage
from vmamba.block import Block, PatchMerging, PatchStem, drop_path_rates, init_linear
from vmamba.checkpoint import LoadReport, convert, fit, load_checkpoint, read
from vmamba.mixers.ss2d import SS2D
from vmamba.models.vmamba import BLOCK_KEYS, VANILLA, VMamba
from vmamba.norm import LayerNorm
from vmamba.registry import register


class PatchExpand(nn.Module):
    """(b, h, w, c) -> (b, scale h, scale w, out_dim): a linear layer spreads each pixel over a patch, then a norm."""

    def __init__(self, dim: int, out_dim: int, scale: int = 2):
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale * scale * out_dim, bias=False)
        self.norm = LayerNorm(out_dim, wide=True)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, scale h, scale w, out_dim)"""
        patches = self.expand(x).unflatten(-1, (self.scale, self.scale, -1))  # (b, h, w, p1, p2, out_dim)
        return self.norm(patches.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2))


class VMUNet(nn.Module):
    """Image (b, in_chans, h, w), h and w multiples of 32, -> map (b, num_classes, h, w).

    One class gives probabilities (the published network ends in a sigmoid), several give logits. Where ``in_chans`` is
    3, an image of one channel is repeated to three.

    Args:
        num_classes: classes of the map.
        in_chans: channels of the image.
        dims: channels of the four encoder stages, each twice the one before.
        depths, depths_decoder: blocks per stage, in the order in which they run.
        state: states n of the scans.
        drop_path_rate: stochastic depth of the last encoder and the first decoder block.
        scan: the order in which the mixers read the map.

    Raises:
        ValueError: channels do not double from stage to stage.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1,
        in_chans: int = 3,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        depths_decoder: Sequence[int] = (2, 2, 2, 1),
        state: int = 16,
        drop_path_rate: float = 0.2,
        scan: str = "cross",
    ):
        super().__init__()
        if any(b != 2 * a for a, b in pairwise(dims)):
            raise ValueError(f"dims must double from stage to stage, got {tuple(dims)}")
        self.in_chans, self.num_classes, self.stride = in_chans, num_classes, 4 * 2 ** (len(dims) - 1)
        block = partial(Block, mixer=partial(SS2D, state=state, scan=scan), mlp_ratio=0.0)

        def stage(change: nn.Module, dim: int, rates: list[float]) -> Stage:
            return Stage(change, [block(dim, drop_path=rate) for rate in rates])

        down = [nn.Identity(), *(PatchMerging(a, b) for a, b in pairwise(dims))]
        up = [nn.Identity(), *(PatchExpand(b, a) for a, b in zip(dims[-2::-1], dims[:0:-1], strict=True))]
        rates = drop_path_rates(drop_path_rate, depths)
        rates_decoder = [r[::-1] for r in drop_path_rates(drop_path_rate, depths_decoder[::-1])[::-1]]
        self.stem = PatchStem(in_chans, dims[0])
        self.encoder = nn.ModuleList(map(stage, down, dims, rates))
        self.decoder = nn.ModuleList(map(stage, up, dims[::-1], rates_decoder))
        self.final_up = PatchExpand(dims[0], dims[0] // 4, scale=4)
        self.final_conv = nn.Conv2d(dims[0] // 4, num_classes, 1)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans or 1, h, w) -> (b, num_classes, h, w)"""
        logits = self.logits(x)
        return logits.sigmoid() if self.num_classes == 1 else logits

    def logits(self, x: Tensor) -> Tensor:
        """(b, in_chans or 1, h, w) -> (b, num_classes, h, w), before the sigmoid of the one-class network."""
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise ValueError(
                f"height and width must be multiples of {self.stride}, got {tuple(x.shape[-2:])}; pad the image"
            )
        x = x.expand(-1, self.in_chans, -1, -1) if x.shape[1] == 1 else x
        x = self.stem(x)
        skips = []
        for stage in cast(Sequence[Stage], self.encoder):
            x = stage.downsample(x)
            skips.append(x)
            x = stage.blocks(x)
        x = self.decoder[0](x)
        for stage in self.decoder[1:]:
            x = stage(x + skips.pop())
        return self.final_conv(self.final_up(x).permute(0, 3, 1, 2))


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
    vanilla = VMamba(depths=(1, 1, 1, 1), dim=model.stem.conv1.out_channels, device="meta", **VANILLA)
    native = convert(source if isinstance(source, Mapping) else read(source), vanilla)
    state, last = {}, len(model.encoder) - 1
    for key, tensor in native.items():
        state[re.sub(r"^stages\.", "encoder.", key)] = tensor
        state[re.sub(r"^stages\.(\d+)\.(?=blocks)", lambda m: f"decoder.{last - int(m[1])}.", key)] = tensor
    _, report = fit(state, model)
    wrong = [*report.misshapen, *(key for key in report.missing if not _OWN.match(key))]
    if wrong:
        raise ValueError(f"these are not the weights of a vanilla VMamba that fits VM-UNet: {', '.join(wrong[:8])}")
    return load_checkpoint(model, state, strict=False)


_OWN = re.compile(r"decoder\.\d+\.downsample\.|final_")  # what VM-UNet has and VMamba has not


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
    *BLOCK_KEYS,
]

register(
    VMUNet, VARIANTS, keys=KEYS, paper="2402.02491", origin="https://github.com/JCruan519/VM-UNet", license="apache-2.0"
)

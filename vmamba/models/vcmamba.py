"""VCMamba: convolutions, then snake scans in the last stage (arXiv:2509.04669, ICCV 2025 workshop on efficient vision).

Original code: Wertyuui345/VCMamba, no licence stated; weights: SLDGroup/VCMamba on Hugging Face. Three stages and the
first part of the fourth are convolutional feed-forward blocks; then position embeddings are added, and blocks around
:class:`PlainMamba` follow. Two classifiers, for training by distillation.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.backbone import Backbone, Stage
from vmamba.block import ChannelsFirst, Conv2d, channels_first, channels_last, drop_path_rates
from vmamba.distilled import DistilledHead
from vmamba.mixers.plainmamba import PlainMamba
from vmamba.registry import Weights, register


class Stem(nn.Module):
    """Stride 4 in two steps: 3x3 convolutions with stride 2, each with a batch norm and ReLU."""

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.conv2 = Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, ceil(h / 4), ceil(w / 4), dim)"""
        x = F.relu(channels_first(self.norm1, self.conv1(channels_last(x))))
        return F.relu(channels_first(self.norm2, self.conv2(x)))


def downsample(dim: int, out_dim: int, **dd: Any) -> nn.Module:
    """Stride 2: a 3x3 convolution and a batch norm."""
    conv, norm = nn.Conv2d(dim, out_dim, 3, 2, 1, **dd), nn.BatchNorm2d(out_dim, **dd)
    return ChannelsFirst(OrderedDict(conv=conv, norm=norm))


def conv_mlp(dim: int, hidden: int, **dd: Any) -> nn.Module:
    """(b, h, w, dim) -> (b, h, w, dim): an MLP over each pixel with a depthwise 3x3 convolution inside."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        fc1=nn.Conv2d(dim, hidden, 1, **dd), norm1=nn.BatchNorm2d(hidden, **dd), act1=nn.GELU(),
        mid=nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, **dd), mid_norm=nn.BatchNorm2d(hidden, **dd),
        act2=nn.GELU(), fc2=nn.Conv2d(hidden, dim, 1, **dd), norm2=nn.BatchNorm2d(dim, **dd),
    )  # fmt: skip
    return ChannelsFirst(layers)


class ConvBlock(nn.Module):
    """x + scale * mlp(x), with the MLP of :func:`conv_mlp`; ``scale``, one for each channel, starts at 1e-5."""

    def __init__(self, dim: int, *, mlp_ratio: float, drop_path: float, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mlp = conv_mlp(dim, int(dim * mlp_ratio), **dd)
        self.scale = LayerScale(dim, 1e-5, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return x + self.drop_path(self.scale(self.mlp(x)))


@register_notrace_module
class Positions(nn.Module):
    """Adds a learned map of ``grid`` x ``grid`` positions, resized where the map has another size."""

    def __init__(self, dim: int, grid: int, *, device=None, dtype=None):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, dim, grid, grid, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal (0.02)."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        positions, size = self.pos_embed, x.shape[1:3]
        if positions.shape[2:] != size:
            wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
            positions = F.interpolate(wide, size, mode="bicubic", antialias=True).to(positions.dtype)
        return x + positions.permute(0, 2, 3, 1)


class MambaBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), with batch norms; ``positions`` come first where there are any."""

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable,
        positions: nn.Module,
        mlp_ratio: float,
        drop_path: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.positions = positions
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.mixer = mixer(dim, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = conv_mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        x = self.positions(x)
        x = x + self.drop_path(self.mixer(channels_first(self.norm1, x)))
        return x + self.drop_path(self.mlp(channels_first(self.norm2, x)))


class VCMamba(Backbone):
    """Stem at stride 4, stages at strides 4, 8, 16, 32.

    Args:
        depths: blocks per stage.
        dims: channels per stage; more than there are stages do no harm.
        mamba_blocks: how many of the last stage's blocks, at its end, are Mamba blocks.
        grid: sides of the position embedding: 7 for images of 224, 16 for 512; other sizes resize it.
        mixer: builds a Mamba block's mixer, ``mixer(dim, scan=..., device=..., dtype=...)``.
        scan: the order in which the mixers read the map: a name, ``"package.module"`` or a function.
        mlp_ratio: hidden width of the MLPs over their channels.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        **backbone: ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``, ``device``, ``dtype`` of
            :class:`Backbone`.
    """

    output_norm = nn.Identity

    head: DistilledHead

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        mamba_blocks: int = 4,
        grid: int = 7,
        mixer: Callable[..., nn.Module] = PlainMamba,
        scan: "str | Callable" = "serpentine",
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **backbone,
    ):
        super().__init__(**backbone)
        dd, last, channels = self._dd, len(depths) - 1, dims[: len(depths)]
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            dim, first = channels[i], max(depths[i] - mamba_blocks, 0) if i == last else depths[i]
            down = downsample(channels[i - 1], dim, **dd) if i else nn.Identity()
            blocks: list[nn.Module] = [
                ConvBlock(dim, mlp_ratio=mlp_ratio, drop_path=rate, **dd) for rate in rates[:first]
            ]
            mamba = partial(MambaBlock, dim, mixer=partial(mixer, scan=scan), mlp_ratio=mlp_ratio, **dd)
            for index, rate in enumerate(rates[first:]):
                positions = nn.Identity() if index else Positions(dim, grid, **dd)
                blocks.append(mamba(positions=positions, drop_path=rate))
            stages.append(Stage(down, blocks))
        strides = [4 * 2**i for i in range(len(depths))]
        self.build(Stem(self.in_chans, dims[0], **dd), stages, channels=channels, strides=strides, head=DistilledHead)

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training return the pair (logits for labels, logits for a teacher) instead of their mean."""
        self.head.distilled_training = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The linear layers before the logits: for labels, and for a teacher."""
        return self.head.fc, self.head.fc_dist


VARIANTS = {
    "vcmamba_s": dict(depths=(4, 4, 12, 8), dims=(32, 64, 144, 288), drop_path_rate=0.2),
    "vcmamba_m": dict(depths=(4, 4, 12, 6), dims=(48, 96, 224, 448), drop_path_rate=0.2),
    "vcmamba_b": dict(depths=(4, 4, 12, 6), dims=(64, 128, 320, 512), drop_path_rate=0.2),
}

# official name -> ours, applied in order; of a tuple, the first that gives a name the model has
KEYS = [
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.1\.", "stem.norm1."),
    (r"^patch_embed\.3\.", "stem.conv2."),
    (r"^patch_embed\.4\.", "stem.norm2."),
    (r"^pos_embed$", tuple(f"stages.3.blocks.{i}.positions.pos_embed" for i in range(8))),
    (r"^network\.([135])\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample."),
    (r"downsample\.proj\.", "downsample.conv."),
    (r"^network\.([0246])\.", lambda m: f"stages.{int(m[1]) // 2}.blocks."),
    (r"layer_scale_2$", "scale.gamma"),
    (r"(blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"(blocks\.\d+)\.mamba\.", r"\1.mixer."),
    (r"mixer\.conv2d\.", "mixer.conv."),
    (r"mixer\.direction_Bs$", "mixer.direction_B"),
    (r"^head\.(?=weight$|bias$)", "head.fc."),
    (r"^dist_head\.", "head.fc_dist."),
]

_HUB = "https://huggingface.co/SLDGroup/VCMamba/resolve/main/"
WEIGHTS = {
    "vcmamba_s": Weights(_HUB + "VCMamba-S.pth", top1=78.7),
    "vcmamba_m": Weights(_HUB + "VCMamba-M.pth", top1=81.5),
    "vcmamba_b": Weights(_HUB + "VCMamba-B.pth", top1=82.6),
}

register(
    VCMamba,
    VARIANTS,
    keys=KEYS,
    weights=WEIGHTS,
    paper="2509.04669",
    origin="https://github.com/Wertyuui345/VCMamba",
    license="none stated",
    timm=dict(first_conv="stem.conv1", classifier=("head.fc", "head.fc_dist"), pool_size=(7, 7)),
)

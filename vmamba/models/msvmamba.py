"""Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model (arXiv:2405.14174, NeurIPS 2024).

Original code and weights: YuHengsss/MSVMamba, which states no licence. VMamba's stages with a scan at two
resolutions and a convolutional feed-forward network, in two published generations that differ in the order of norms,
sums and gates.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath
from timm.layers.squeeze_excite import SqueezeExciteCl
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.backbone import Backbone, Stage
from vmamba.block import Conv2d, ConvDownsample, ConvStem, PatchMerging, PatchStem, drop_path_rates
from vmamba.mixers.ms2d import COARSE, FINE, MS2D
from vmamba.models import vmamba
from vmamba.norm import LayerNorm
from vmamba.registry import Weights, register


class ConvFFN(nn.Module):
    """Linear, x + depthwise 3x3 convolution of x, GELU, linear.

    Args:
        dim: channels c.
        ratio: hidden width over c.
    """

    def __init__(self, dim: int, *, ratio: float, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(ratio * dim)
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.conv = Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        x = self.fc1(x)
        return self.fc2(self.act(x + self.conv(x)))


def norm_first(dim: int, *, ratio: float, device=None, dtype=None) -> nn.Sequential:
    """ConvFFN(norm(x)), as in the first generation."""
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    return nn.Sequential(OrderedDict(norm=LayerNorm(dim, **dd), ffn=ConvFFN(dim, ratio=ratio, **dd)))


def norm_last(dim: int, *, ratio: float, device=None, dtype=None) -> nn.Sequential:
    """norm(ConvFFN(x)), as in v3."""
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    return nn.Sequential(OrderedDict(ffn=ConvFFN(dim, ratio=ratio, **dd), norm=LayerNorm(dim, **dd)))


squeeze_excite = partial(SqueezeExciteCl, rd_ratio=1 / 8, rd_divisor=1, bias=False)


def norm_and_squeeze(dim: int, *, device=None, dtype=None) -> nn.Sequential:
    """Squeeze-and-excitation of norm(x), the output norm of v3's mixer."""
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    return nn.Sequential(OrderedDict(norm=LayerNorm(dim, **dd), se=squeeze_excite(dim, **dd)))


class MSBlock(nn.Module):
    """x + mixer(norm(x)), then x + ffn(x); both branches share one stochastic-depth rate.

    Args:
        dim: channels c.
        mixer, ffn: build the branches, ``mixer(dim, device=..., dtype=...)``: (b, h, w, c) -> (b, h, w, c); a norm
            before or after the feed-forward network is part of ``ffn``.
        drop_path: probability of dropping a branch for a sample.
    """

    def __init__(self, dim: int, *, mixer: Callable, ffn: Callable, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = mixer(dim, **dd)
        self.mlp = ffn(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(x))


class MSVMamba(Backbone):
    """Stem at stride 4, stages at strides 4, 8, 16, 32 with channels dim, 2 dim, 4 dim, 8 dim.

    Args:
        depths: blocks per stage.
        dim: channels of the first stage.
        mixer: builds a block's mixer, ``mixer(dim, scan=..., device=..., dtype=...)``.
        ffn: builds a block's feed-forward network with its norm, ``ffn(dim, device=..., dtype=...)``.
        stem, downsample: classes of the stem and of the downsampling between stages.
        scan: the order in which the mixers read their coarse map: a name, ``"package.module"`` or a function.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        **backbone: ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``, ``device``, ``dtype`` of
            :class:`Backbone`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dim: int,
        mixer: Callable[..., nn.Module],
        ffn: Callable[..., nn.Module],
        stem: Callable[..., nn.Module],
        downsample: Callable[..., nn.Module],
        scan: "str | Callable" = "chained",
        drop_path_rate: float = 0.0,
        **backbone,
    ):
        super().__init__(**backbone)
        dd = self._dd
        channels = [dim * 2**i for i in range(len(depths))]
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            down = downsample(channels[i - 1], channels[i], **dd) if i else nn.Identity()
            block = partial(MSBlock, channels[i], mixer=partial(mixer, scan=scan), ffn=ffn, **dd)
            stages.append(Stage(down, [block(drop_path=rate) for rate in rates]))
        self.build(
            stem(self.in_chans, dim, **dd), stages, channels=channels, strides=[4 * 2**i for i in range(len(depths))]
        )


V1_MIXER = partial(
    MS2D,
    expand=2.0,
    branches={"coarse": COARSE, "fine": FINE},
    route_norm=LayerNorm,
    resize=partial(F.interpolate, mode="bilinear"),
    norm=squeeze_excite,
)
V3_MIXER = partial(MS2D, norm=norm_and_squeeze)
V1: dict[str, Any] = dict(
    mixer=V1_MIXER, ffn=partial(norm_first, ratio=2), stem=PatchStem, downsample=PatchMerging, drop_path_rate=0.2
)
V3: dict[str, Any] = dict(
    mixer=partial(V3_MIXER, gate=None), ffn=partial(norm_last, ratio=4), stem=ConvStem, downsample=ConvDownsample
)

VARIANTS = {
    "msvmamba_nano": dict(depths=(1, 2, 5, 2), dim=48, **V1),
    "msvmamba_micro": dict(depths=(1, 2, 5, 2), dim=64, **V1),
    "msvmamba_tiny": dict(depths=(1, 2, 9, 2), dim=96, **V1),
    "msvmamba_v3_tiny": dict(depths=(2, 2, 9, 2), dim=96, drop_path_rate=0.2, **V3),
    "msvmamba_v3_small": dict(depths=(2, 3, 20, 2), dim=96, drop_path_rate=0.4, **V3),
    "msvmamba_v3_base": dict(depths=(2, 4, 18, 2), dim=128, drop_path_rate=0.5, **{**V3, "mixer": V3_MIXER}),
}

# official name -> ours, applied in order; of a tuple, the first that gives a name the model has
BLOCK_KEYS = [
    (r"\bnorm2\.", "mlp.norm."),
    (r"\bconvFFN\.linear([12])\.", r"mlp.ffn.fc\1."),
    (r"\bconvFFN\.dwc\.", "mlp.ffn.conv."),
    (r"\bop\.conv2d\.", "op.convs.fine."),
    (r"\bop\.conv2d_b1\.", "op.convs.coarse."),
    (r"\bop\.out_norm\.", ("op.route_norm.", "op.norm.norm.")),
    (r"\bop\.se\.fc\.0\.", ("op.norm.fc1.", "op.norm.se.fc1.")),
    (r"\bop\.se\.fc\.2\.", ("op.norm.fc2.", "op.norm.se.fc2.")),
    *vmamba.BLOCK_KEYS,
]
KEYS = [*BLOCK_KEYS, *vmamba.KEYS]

_HUB = "https://huggingface.co/YuhengSSS/MSVMamba/resolve/main/"
WEIGHTS = {
    "msvmamba_v3_tiny": Weights(_HUB + "msvmambav3_tiny_224.pth", top1=83.0),
    "msvmamba_v3_small": Weights(_HUB + "msvmambav3_small_224.pth", top1=84.1),
    "msvmamba_v3_base": Weights(_HUB + "msvmambav3_base_224.pth", top1=84.4),
}

register(
    MSVMamba,
    VARIANTS,
    keys=KEYS,
    weights=WEIGHTS,
    paper="2405.14174",
    origin="https://github.com/YuHengsss/MSVMamba",
    license="none stated",
    timm=dict(first_conv="stem.conv1", classifier="head.fc", pool_size=(7, 7)),
)

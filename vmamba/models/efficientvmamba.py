"""EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba (arXiv:2403.09977, AAAI 2025).

Original code and weights: TerryPei/EfficientVMamba, Apache-2.0 by its README. The first two stages run an atrous
selective scan beside a convolution, the last two are inverted residuals with squeeze-and-excitation.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from vmamba.backbone import Backbone, Stage
from vmamba.block import ChannelsFirst, PatchMerging, PatchStem, drop_path_rates
from vmamba.mixers.ss2d import SS2D
from vmamba.models import vmamba
from vmamba.norm import LayerNorm
from vmamba.registry import register


class ChannelGate(nn.Module):
    """x times one number in (0, 1) per channel, found from the mean of norm(x): squeeze-and-excitation after a norm.

    Args:
        dim: channels c; dim // 8 of them in the middle.
    """

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, **dd)
        self.fc1 = nn.Linear(dim, dim // 8, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(dim // 8, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        mean = self.norm(x).mean((1, 2), keepdim=True)
        return x * self.fc2(self.act(self.fc1(mean))).sigmoid()


class EVSSBlock(nn.Module):
    """x + gate(mixer(norm(x))) + gate(conv(norm(x))); both branches share the gate.

    Args:
        dim: channels c.
        mixer: builds the token mixer, ``mixer(dim, device=..., dtype=...)``: (b, h, w, c) -> (b, h, w, c).
        drop_path: probability of dropping both branches for a sample.
    """

    def __init__(self, dim: int, *, mixer: Callable, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = mixer(dim, **dd)
        depthwise, pointwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd), nn.Conv2d(dim, dim, 1, **dd)
        self.conv = ChannelsFirst(depthwise, nn.BatchNorm2d(dim, **dd), nn.GELU(), pointwise)
        self.gate = ChannelGate(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        y = self.norm1(x)
        return x + self.drop_path(self.gate(self.mixer(y)) + self.gate(self.conv(y)))


class InvertedResidual(ChannelsFirst):
    """An inverted residual with squeeze-and-excitation, four times as wide inside (MobileNetV2, arXiv:1801.04381).

    Args:
        dim: channels c.
        drop_path: probability of dropping the branch for a sample.
    """

    def __init__(self, dim: int, *, drop_path: float = 0.0, device=None, dtype=None):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = 4 * dim
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv_pw=nn.Conv2d(dim, wide, 1, bias=False, **dd), bn1=nn.BatchNorm2d(wide, **dd), act1=nn.ReLU(True),
            conv_dw=nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False, **dd),
            bn2=nn.BatchNorm2d(wide, **dd), act2=nn.ReLU(True), se=SqueezeExcite(wide, rd_channels=wide // 8, **dd),
            conv_pwl=nn.Conv2d(wide, dim, 1, bias=False, **dd), bn3=nn.BatchNorm2d(dim, **dd),
            drop_path=DropPath(drop_path) if drop_path > 0 else nn.Identity(),
        )  # fmt: skip
        super().__init__(layers)

    def forward(self, input: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return input + super().forward(input)


class EfficientVMamba(Backbone):
    """Stem at stride 4, stages at strides 4, 8, 16, 32 with channels dim, 2 dim, 4 dim, 8 dim.

    Args:
        depths: blocks per stage.
        dim: channels of the first stage.
        mixers: per stage the mixer of its :class:`EVSSBlock`, ``mixer(dim, scan=..., device=..., dtype=...)``, or None
            for a stage of :class:`InvertedResidual`; may be longer than ``depths``.
        scan: the order in which the mixers read the map: a name, ``"package.module"`` or a function.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        **backbone: ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``, ``device``, ``dtype`` of
            :class:`Backbone`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dim: int,
        mixers: Sequence[Callable[..., nn.Module] | None] = (SS2D, SS2D, None, None),
        scan: "str | Callable" = "atrous",
        drop_path_rate: float = 0.0,
        **backbone,
    ):
        super().__init__(**backbone)
        dd = self._dd
        channels = [dim * 2**i for i in range(len(depths))]
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            down = PatchMerging(channels[i - 1], channels[i], **dd) if i else nn.Identity()
            mixer = mixers[i]
            block = InvertedResidual if mixer is None else partial(EVSSBlock, mixer=partial(mixer, scan=scan))
            stages.append(Stage(down, [block(channels[i], drop_path=rate, **dd) for rate in rates]))
        self.build(
            PatchStem(self.in_chans, dim, **dd),
            stages,
            channels=channels,
            strides=[4 * 2**i for i in range(len(depths))],
        )


VARIANTS = {
    "efficientvmamba_tiny": dict(depths=(2, 2, 4, 2), dim=48, drop_path_rate=0.1),
    "efficientvmamba_small": dict(depths=(2, 2, 4, 2), dim=64, drop_path_rate=0.1),
    "efficientvmamba_base": dict(depths=(2, 2, 9, 2), dim=96, drop_path_rate=0.1),
}

# official name -> ours; the stages of inverted residuals are flat there, with the blocks at 1..n
BLOCK_KEYS = [
    (r"\bconv_branch\.", "conv."),
    (r"\bse\.(?=norm\.)", "gate."),
    (r"\bse\.global_reduce\.", "gate.fc1."),
    (r"\bse\.channel_select\.", "gate.fc2."),
    (r"\bconv_(?:pw|dw|pw2)\.1\.", lambda m: {"pw": "bn1.", "dw": "bn2.", "pw2": "bn3."}[m[0][5:-3]]),
    (r"\bconv_(pw|dw)\.0\.", r"conv_\1."),
    (r"\bconv_pw2\.0\.", "conv_pwl."),
    *vmamba.BLOCK_KEYS,
]
KEYS = [
    (r"^layers\.(\d+)\.(\d+)\.(?=conv_|se\.)", lambda m: f"layers.{m[1]}.blocks.{int(m[2]) - 1}."),
    (r"^layers\.(\d+)\.\d+\.(?=reduction|norm)", r"layers.\1.downsample."),
    *BLOCK_KEYS,
    *vmamba.KEYS,
]

register(
    EfficientVMamba,
    VARIANTS,
    keys=KEYS,
    paper="2403.09977",
    origin="https://github.com/TerryPei/EfficientVMamba",
    license="apache-2.0",
    timm=dict(first_conv="stem.conv1", classifier="head.fc", pool_size=(7, 7)),
)

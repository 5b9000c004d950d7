"""MambaVision: A Hybrid Mamba-Transformer Vision Backbone (arXiv:2407.08083, CVPR 2025).

Original code: NVlabs/MambaVision, under a non-commercial licence of NVIDIA; its weights are CC-BY-NC-SA-4.0 and are not
linked here, but files of the original load. This is an implementation of its own, by the paper. Two stages of
convolutions, then two stages in windows: first Mamba, in the second half of a stage attention.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.backbone import Backbone, Stage
from vmamba.block import Block, ChannelsFirst, Conv2d, channels_last, drop_path_rates
from vmamba.mixers.attention import SelfAttention
from vmamba.mixers.mambavision import MambaVisionMixer
from vmamba.registry import register


class Stem(nn.Module):
    """Stride 4 in two steps: 3x3 convolutions with stride 2, to ``hidden`` and ``dim`` channels, batch norms, ReLU."""

    def __init__(self, in_chans: int, hidden: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = ChannelsFirst(
            nn.Conv2d(in_chans, hidden, 3, 2, 1, bias=False, **dd), nn.BatchNorm2d(hidden, eps=1e-4, **dd), nn.ReLU(),
            nn.Conv2d(hidden, dim, 3, 2, 1, bias=False, **dd), nn.BatchNorm2d(dim, eps=1e-4, **dd), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, ceil(h / 4), ceil(w / 4), dim)"""
        return self.layers(channels_last(x))


class ConvBlock(nn.Module):
    """x plus two 3x3 convolutions of it, each with a batch norm, GELU (its tanh form) between them."""

    def __init__(self, dim: int, *, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(dim, dim, 3, padding=1, **dd), norm1=nn.BatchNorm2d(dim, **dd),
            act=nn.GELU(approximate="tanh"),
            conv2=nn.Conv2d(dim, dim, 3, padding=1, **dd), norm2=nn.BatchNorm2d(dim, **dd),
        )  # fmt: skip
        self.layers = ChannelsFirst(layers)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return x + self.drop_path(self.layers(x))


class WindowStage(Stage):
    """A stage whose blocks see windows of ``side`` x ``side`` pixels, each a map of its own, which never shift.

    Zeros fill up the last row and column of windows; blocks take them for pixels, in scans and attention too.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], *, side: int):
        super().__init__(downsample, blocks)
        self.side = side

    def run(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        b, h, w, _ = x.shape
        s, rows, columns = self.side, -(-h // self.side), -(-w // self.side)
        x = F.pad(x, (0, 0, 0, columns * s - w, 0, rows * s - h))
        windows = x.unflatten(1, (rows, s)).unflatten(3, (columns, s)).transpose(2, 3).flatten(0, 2)
        y = super().run(windows)  # (b * rows * columns, s, s, c)
        y = y.unflatten(0, (b, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return y[:, :h, :w]


class MambaVision(Backbone):
    """Stem at stride 4, stages at strides 4, 8, 16, 32 with channels dim, 2 dim, 4 dim, 8 dim.

    Args:
        depths: blocks per stage; settings per stage may be longer.
        dim: channels of the first stage.
        stem_dim: channels inside the stem.
        heads: attention heads per stage.
        windows: sides of the windows per stage, in pixels of its map; None for a stage of convolutions. Weights do not
            depend on them, results do: use those of the training.
        layer_scale: initial factor on the branches in windows, learned for each channel; None for no factors.
        scan: the order in which the mixers read a window: a name, ``"package.module"`` or a function.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        **backbone: ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``, ``device``, ``dtype`` of
            :class:`Backbone`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dim: int,
        stem_dim: int,
        heads: Sequence[int],
        windows: Sequence[int | None],
        layer_scale: float | None = None,
        scan: "str | Callable" = "raster",
        drop_path_rate: float = 0.0,
        **backbone,
    ):
        super().__init__(**backbone)
        dd = self._dd
        channels = [dim * 2**i for i in range(len(depths))]
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            down = Conv2d(channels[i - 1], channels[i], 3, 2, 1, bias=False, **dd) if i else nn.Identity()
            side = windows[i]
            if side is None:
                stages.append(Stage(down, [ConvBlock(channels[i], drop_path=rate, **dd) for rate in rates]))
                continue
            attention = depths[i] // 2  # blocks, at the stage's end
            mixers = [partial(MambaVisionMixer, scan=scan)] * (depths[i] - attention)
            mixers += [partial(SelfAttention, heads=heads[i])] * attention
            block = partial(Block, channels[i], layer_scale=layer_scale, **dd)
            blocks = [block(mixer=mixer, drop_path=rate) for mixer, rate in zip(mixers, rates, strict=True)]
            stages.append(WindowStage(down, blocks, side=side))
        self.build(
            Stem(self.in_chans, stem_dim, dim, **dd),
            stages,
            channels=channels,
            strides=[4 * 2**i for i in range(len(depths))],
            norm=ChannelsFirst(nn.BatchNorm2d(channels[-1], **dd)),
        )


T: dict[str, Any] = dict(heads=(2, 4, 8, 16), windows=(None, None, 14, 7), drop_path_rate=0.2)
B: dict[str, Any] = {**T, "stem_dim": 64, "layer_scale": 1e-5, "drop_path_rate": 0.3}
L: dict[str, Any] = {**B, "heads": (4, 8, 16, 32)}
L3: dict[str, Any] = {**L, "windows": (None, None, 16, 8), "drop_path_rate": 0.5}

VARIANTS = {
    "mambavision_t": dict(depths=(1, 3, 8, 4), dim=80, stem_dim=32, **T),
    "mambavision_t2": dict(depths=(1, 3, 11, 4), dim=80, stem_dim=32, **T),
    "mambavision_s": dict(depths=(3, 3, 7, 5), dim=96, stem_dim=64, **T),
    "mambavision_b": dict(depths=(3, 3, 10, 5), dim=128, **B),
    "mambavision_l": dict(depths=(3, 3, 10, 5), dim=196, **L),
    "mambavision_l2": dict(depths=(3, 3, 12, 5), dim=196, **L),
    "mambavision_l3": dict(depths=(3, 3, 20, 10), dim=256, **L3),
}
SIZES = {"mambavision_l3": 256}  # of images; 224 otherwise. The windows of the last two stages equal their maps then
CROPS = {"mambavision_t": 1.0, "mambavision_t2": 0.98, "mambavision_s": 0.93, "mambavision_b": 1.0}

# official name -> ours, applied in order; of a tuple, the first that gives a name the model has
KEYS = [
    (r"^encoder\.", ""),
    (r"^patch_embed\.conv_down\.", "stem.layers."),
    (r"^levels\.(\d+)\.downsample\.reduction\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^levels\.", "stages."),
    (r"(blocks\.\d+)\.((?:conv|norm)[12])\.", (r"\1.layers.\2.", r"\1.\2.")),
    (r"\.gamma_([12])$", r".scale\1.gamma"),
    (r"mixer\.conv1d_x\.weight$", "mixer.conv.weight[0]"),
    (r"mixer\.conv1d_z\.weight$", "mixer.conv.weight[1]"),
    (r"mixer\.(x_proj|dt_proj)\.weight$", r"mixer.\1"),
    (r"mixer\.dt_proj\.bias$", "mixer.dt_bias"),
    (r"^norm\.", "norm.0."),
    (r"^head\.(?=weight$|bias$)", "head.fc."),
]

for _name, _settings in VARIANTS.items():
    _size = SIZES.get(_name, 224)
    register(
        MambaVision,
        {_name: _settings},
        keys=KEYS,
        paper="2407.08083",
        origin="https://github.com/NVlabs/MambaVision",
        license="cc-by-nc-sa-4.0",
        timm=dict(
            first_conv="stem.layers.0",
            classifier="head.fc",
            input_size=(3, _size, _size),
            pool_size=(_size // 32, _size // 32),
            crop_pct=CROPS.get(_name, 0.875),
        ),
    )

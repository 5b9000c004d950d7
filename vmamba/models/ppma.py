"""PPMA: Polyline Path Masked Attention for Vision Transformer (arXiv:2506.15940, NeurIPS 2025).

Original code: zhongchenzhao/PPMA, Apache-2.0. Four stages of residual blocks around attention whose logits decay along
polyline paths: within rows and columns in the first stages, over the whole map in the last ones. Nothing is scanned.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from vmamba.backbone import Backbone, Stage
from vmamba.block import ChannelsFirst, Conv2d, channels_first, channels_last, drop_path_rates
from vmamba.mixers.polyline import PolylineAttention, criss_cross, full
from vmamba.norm import LayerNorm
from vmamba.registry import register

HEAD_WIDTH = 1024  # channels between the last stage and the pooling


class Stem(nn.Module):
    """Stride 4 by four 3x3 convolutions, the first and the third of stride 2, with batch norms and GELU between."""

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.conv2 = Conv2d(dim // 2, dim // 2, 3, 1, 1, **dd)
        self.norm2 = nn.BatchNorm2d(dim // 2, **dd)
        self.conv3 = Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm3 = nn.BatchNorm2d(dim, **dd)
        self.conv4 = Conv2d(dim, dim, 3, 1, 1, **dd)
        self.norm4 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, ceil(h / 4), ceil(w / 4), dim)"""
        x = self.act(channels_first(self.norm1, self.conv1(channels_last(x))))
        x = self.act(channels_first(self.norm2, self.conv2(x)))
        x = self.act(channels_first(self.norm3, self.conv3(x)))
        return channels_first(self.norm4, self.conv4(x))


def downsample(dim: int, out_dim: int, **dd: Any) -> nn.Module:
    """Stride 2: a 3x3 convolution and a batch norm."""
    conv, norm = nn.Conv2d(dim, out_dim, 3, 2, 1, **dd), nn.BatchNorm2d(out_dim, **dd)
    return ChannelsFirst(OrderedDict(conv=conv, norm=norm))


class ConvMlp(nn.Module):
    """An MLP whose hidden map, after GELU, has a depthwise 3x3 convolution added to it."""

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.conv = Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        x = self.act(self.fc1(x))
        return self.fc2(x + self.conv(x))


class Block(nn.Module):
    """x + conv(x), then x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: channels c.
        mixer: builds the token mixer, ``mixer(dim, device=..., dtype=...)``: (b, h, w, c) -> (b, h, w, c).
        mlp_ratio: hidden width of the MLP over c.
        layer_scale: initial factor on the two branches, learned for each channel; None for no factors.
        drop_path: probability of dropping a branch for a sample.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable[..., nn.Module],
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        scale = nn.Identity if layer_scale is None else partial(LayerScale, dim, layer_scale, **dd)
        self.conv = Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = mixer(dim, **dd)
        self.scale1 = scale()
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), **dd)
        self.scale2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        x = x + self.conv(x)
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class Widen(nn.Module):
    """What each pixel goes through before the pooling: linear layer, batch norm, SiLU."""

    def __init__(self, dim: int, out_dim: int, *, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Linear(dim, out_dim, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, out_dim)"""
        return self.act(channels_first(self.norm, self.proj(x)))


class PPMA(Backbone):
    """Stem at stride 4, stages at strides 4, 8, 16, 32; settings per stage may be longer than ``depths``.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        mixers: per stage, builds a block's mixer, ``mixer(dim, device=..., dtype=...)``.
        mlp_ratios: per stage, hidden width of the MLPs over their channels.
        layer_scales: per stage, initial factor on the branches of the blocks; None for no factors.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        **backbone: ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``, ``device``, ``dtype`` of
            :class:`Backbone`.
    """

    output_norm = partial(LayerNorm, eps=1e-6, wide=True)

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        mixers: Sequence[Callable[..., nn.Module]],
        mlp_ratios: Sequence[float],
        layer_scales: Sequence[float | None],
        drop_path_rate: float = 0.0,
        **backbone,
    ):
        super().__init__(**backbone)
        dd = self._dd
        dims = tuple(dims[: len(depths)])
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            down = downsample(dims[i - 1], dims[i], **dd) if i else nn.Identity()
            build = partial(Block, dims[i], mixer=mixers[i], mlp_ratio=mlp_ratios[i], layer_scale=layer_scales[i], **dd)
            stages.append(Stage(down, [build(drop_path=rate) for rate in rates]))
        self.build(
            Stem(self.in_chans, dims[0], **dd),
            stages,
            channels=dims,
            strides=[4 * 2**i for i in range(len(depths))],
            norm=Widen(dims[-1], HEAD_WIDTH, **dd),
            num_features=HEAD_WIDTH,
        )


NARROW = partial(PolylineAttention, head_dim=16, attend=criss_cross)
CROSS = partial(PolylineAttention, head_dim=32, attend=criss_cross)
FULL = partial(PolylineAttention, head_dim=32, attend=full)

TINY = dict(mlp_ratios=(3, 3, 3, 3), mixers=(NARROW, CROSS, FULL, FULL), layer_scales=(None,) * 4)
SMALL = dict(mlp_ratios=(4, 4, 3, 3), mixers=(NARROW, CROSS, CROSS, FULL), layer_scales=(None,) * 4)
BASE = dict(mlp_ratios=(4, 4, 3, 3), mixers=(NARROW, CROSS, CROSS, FULL), layer_scales=(None, None, 1e-6, 1e-6))

VARIANTS = {
    "ppma_tiny": dict(depths=(2, 2, 8, 2), dims=(64, 128, 256, 512), drop_path_rate=0.1, **TINY),
    "ppma_small": dict(depths=(3, 4, 18, 4), dims=(64, 128, 256, 512), drop_path_rate=0.15, **SMALL),
    "ppma_base": dict(depths=(4, 8, 25, 8), dims=(80, 160, 320, 512), drop_path_rate=0.4, **BASE),
}

KEYS = [
    (r"^layers\.\d+\.Relpos\.angle$", ""),  # the frequencies of the positions: constants
    (r"^patch_embed\.proj\.(\d+)\.", lambda m: f"stem.{('conv', 'norm')[int(m[1]) % 3]}{int(m[1]) // 3 + 1}."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"downsample\.reduction\.", "downsample.conv."),
    (r"^layers\.", "stages."),
    (r"\.pos\.conv\.", ".conv."),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.retention\.", ".mixer."),
    (r"\.lepe\.conv\.", ".local."),
    (r"\.path_embed\.dt_linear\.", ".dt_proj."),
    (r"\.path_embed\.", "."),
    (r"\.gamma_(\d)$", r".scale\1.gamma"),
    (r"\.ffn\.", ".mlp."),
    (r"\.dwconv\.conv\.", ".conv."),
    (r"^(proj\.|norm\.)", (r"norm.\1", r"\1")),
    (r"^head\.(?=weight$|bias$)", "head.fc."),
]

register(
    PPMA,
    VARIANTS,
    keys=KEYS,
    paper="2506.15940",
    origin="https://github.com/zhongchenzhao/PPMA",
    license="apache-2.0",
    timm=dict(first_conv="stem.conv1", classifier="head.fc", pool_size=(7, 7)),
)

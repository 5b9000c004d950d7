"""MobileMamba: Lightweight Multi-Receptive Visual Mamba Network (arXiv:2411.15941, CVPR 2025).

Original code and weights: lewandofskee/MobileMamba, MIT. Three stages at strides 16, 32, 64: wavelets and a scan for
the long range, one depthwise convolution for the middle, the rest of the channels as they are. After training,
``fuse()`` folds every batch norm into the layer beside it; the published speeds are those of fused networks.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from timm.layers import ClassifierHead, DropPath, SqueezeExcite, get_device_dtype
from timm.utils import reparameterize_model
from torch import Tensor, nn

from vmamba.backbone import Backbone, Stage
from vmamba.block import channels_last, drop_path_rates
from vmamba.convbn import BatchNorm1d, ConvBN, Residual, ZeroBatchNorm2d
from vmamba.mixers.multi_receptive import MultiReceptiveMixer
from vmamba.registry import register


class FFN(nn.Module):
    """Pointwise convolutions to 2c channels and back, each with a batch norm, ReLU between them."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = ConvBN(dim, 2 * dim, **dd)
        self.act = nn.ReLU()
        self.conv2 = ConvBN(2 * dim, dim, bn=ZeroBatchNorm2d, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return self.conv2(self.act(self.conv1(x)))


def depthwise(dim: int, *, device=None, dtype=None) -> Residual:
    """(b, h, w, c) -> (b, h, w, c): x plus its 3x3 depthwise convolution."""
    return Residual(ConvBN(dim, dim, 3, groups=dim, bn=ZeroBatchNorm2d, device=device, dtype=dtype))


class Stem(nn.Module):
    """Stride 16 in four steps: 3x3 convolutions with stride 2 and a batch norm, ReLU between them."""

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        widths = [in_chans, dim // 8, dim // 4, dim // 2, dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [ConvBN(before, after, 3, stride=2, device=device, dtype=dtype), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, ceil(h / 16), ceil(w / 16), dim)"""
        return self.layers(channels_last(x))


class Merging(nn.Module):
    """Stride 2 by an inverted residual of 4c channels without its shortcut, with squeeze-and-excitation."""

    def __init__(self, dim: int, out_dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = ConvBN(dim, 4 * dim, **dd)
        self.conv2 = ConvBN(4 * dim, 4 * dim, 3, stride=2, groups=4 * dim, **dd)
        self.act = nn.ReLU()
        self.se = SqueezeExcite(4 * dim, rd_ratio=1 / 4, **dd)
        self.conv3 = ConvBN(4 * dim, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, ceil(h / 2), ceil(w / 2), out_dim)"""
        x = self.act(self.conv2(self.act(self.conv1(x))))
        return self.conv3(self.se(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Downsample(nn.Sequential):
    """Stride 2: depthwise convolution and FFN, merging, depthwise convolution and FFN."""

    def __init__(self, dim: int, out_dim: int, *, device=None, dtype=None):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        before, after = (nn.Sequential(depthwise(c, **dd), Residual(FFN(c, **dd))) for c in (dim, out_dim))
        super().__init__(before, Merging(dim, out_dim, **dd), after)


class MobileMambaBlock(nn.Module):
    """x + layers(x), where each of the five layers has a shortcut of its own: x goes through twice, as published.

    Args:
        dim: channels c.
        mixer: builds the token mixer, ``mixer(dim, device=..., dtype=...)``: (b, h, w, c) -> (b, h, w, c).
        drop_path: probability of dropping all layers for a sample.
    """

    def __init__(self, dim: int, *, mixer: Callable, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dw0, self.ffn0 = depthwise(dim, **dd), Residual(FFN(dim, **dd))
        self.mixer = Residual(mixer(dim, **dd))
        self.dw1, self.ffn1 = depthwise(dim, **dd), Residual(FFN(dim, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        y = self.mixer(self.ffn0(self.dw0(x)))
        return x + self.drop_path(self.ffn1(self.dw1(y)))


class NormHead(ClassifierHead):
    """Pooling, batch norm, classifier; takes the arguments of timm's ``ClassifierHead``."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.bn = self._norm(options.get("device"), options.get("dtype"))

    def _norm(self, device=None, dtype=None) -> nn.Module:
        """A batch norm of pooled features; nothing where they are not pooled."""
        pooled = self.global_pool.pool_type
        return BatchNorm1d(self.num_features, device=device, dtype=dtype) if pooled else nn.Identity()

    def reset(self, *args, **options) -> None:
        """A new classifier, as in timm; the batch norm stays unless the number of pooled features changes."""
        super().reset(*args, **options)
        new = self._norm(options.get("device"), options.get("dtype"))
        if getattr(new, "num_features", None) != getattr(self.bn, "num_features", None):
            self.bn = new.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b, h, w, c) -> (b, num_classes), or (b, c) with ``pre_logits``"""
        x = self.drop(self.bn(self.global_pool(x)))
        return x if pre_logits else self.fc(x)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Itself with the batch norm in the classifier, which then takes what the pooling gives."""
        fold(self.bn, self.fc)
        if isinstance(self.fc, nn.Linear):
            self.bn = nn.Identity()
        return self


def fold(bn: nn.Module, linear: nn.Module) -> None:
    """Put a batch norm into the linear layer after it; nothing happens where either is missing."""
    if isinstance(bn, nn.BatchNorm1d) and isinstance(linear, nn.Linear):
        mean, var = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
        gain = bn.weight * (var + bn.eps).rsqrt()
        linear.bias.add_(linear.weight @ (bn.bias - mean * gain))
        linear.weight.mul_(gain)


class MobileMamba(Backbone):
    """Stem at stride 16, stages at strides 16, 32, 64.

    Args:
        depths: blocks per stage.
        dims: channels per stage, multiples of 8; may be longer than ``depths``, as ``mixers`` may.
        mixers: per stage the mixer of its blocks, ``mixer(dim, scan=..., device=..., dtype=...)``.
        scan: the order in which the mixers read the map: a name, ``"package.module"`` or a function.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        distillation: a second head that learns from a teacher; logits are the mean of both.
        **backbone: ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``, ``device``, ``dtype`` of
            :class:`Backbone`.
    """

    output_norm = nn.Identity

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        mixers: Sequence[Callable[..., nn.Module]],
        scan: "str | Callable" = "bidirectional",
        drop_path_rate: float = 0.0,
        distillation: bool = False,
        **backbone,
    ):
        super().__init__(**backbone)
        dd, channels = self._dd, list(dims[: len(depths)])
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            down = Downsample(channels[i - 1], channels[i], **dd) if i else nn.Identity()
            build = partial(MobileMambaBlock, channels[i], mixer=partial(mixers[i], scan=scan), **dd)
            stages.append(Stage(down, [build(drop_path=rate) for rate in rates]))
        head = partial(NormHead, input_fmt=self.output_fmt, **self._head_options, **dd)
        self.head_dist = head(channels[-1], self.num_classes) if distillation else None
        self.distilled_training = False
        strides = [16 * 2**i for i in range(len(depths))]
        stem = Stem(self.in_chans, channels[0], **dd)
        self.build(stem, stages, channels=channels, strides=strides, norm=nn.Identity(), head=NormHead)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the logits of both heads as a pair in training (timm's name for it).

        Raises:
            ValueError: the network has no second head.
        """
        if enable and self.head_dist is None:
            raise ValueError("there is one head only; make the network with distillation=True")
        self.distilled_training = enable

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """(b, h, w, c) -> logits (b, num_classes), or the normalised pooled features (b, c) with ``pre_logits``."""
        y = self.head(x, pre_logits=pre_logits)
        if pre_logits or self.head_dist is None:
            return y
        pair = y, self.head_dist(x)
        return pair if self.training and self.distilled_training else (pair[0] + pair[1]) / 2

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers of ``num_classes`` (0: none), pooling as before unless ``global_pool`` is given."""
        super().reset_classifier(num_classes, global_pool)
        if self.head_dist is not None:
            options = {"in_features": self.num_features, **get_device_dtype(self)}
            self.head_dist.reset(num_classes, global_pool, **options)

    def fuse(self) -> "MobileMamba":
        """Fold batch norms and scales into the layers beside them, in place, for inference; the logits stay the same.

        No batch norm is left unless the network has no classifier. The weights can then no longer be trained as before.
        """
        return cast(MobileMamba, reparameterize_model(self, inplace=True))


def _stages(kernels=(7, 5, 3), far=(0.8, 0.7, 0.6), near=(0.2, 0.2, 0.3)) -> tuple[Callable[..., nn.Module], ...]:
    """The published mixers of the three stages."""
    triples = zip(kernels, far, near, strict=True)
    return tuple(partial(MultiReceptiveMixer, kernel=k, global_ratio=f, local_ratio=n) for k, f, n in triples)


SMALL: dict[str, Any] = dict(depths=(1, 2, 2), mixers=_stages(), drop_path_rate=0.0)
BASE: dict[str, Any] = dict(depths=(2, 3, 2), dims=(200, 376, 448), mixers=_stages(), drop_path_rate=0.03)

VARIANTS = {
    "mobilemamba_t2": dict(dims=(144, 272, 368), **SMALL),
    "mobilemamba_t4": dict(dims=(176, 368, 448), **SMALL),
    "mobilemamba_s6": dict(dims=(192, 384, 448), **SMALL),
    "mobilemamba_b1": BASE,
    "mobilemamba_b2": BASE,
    "mobilemamba_b4": BASE,
}
SIZES = {"t2": 192, "t4": 192, "s6": 224, "b1": 256, "b2": 384, "b4": 512}


def _place(match: re.Match) -> str:
    """The first three children of a later stage are its downsampling."""
    stage, child = int(match[1]) - 1, int(match[2])
    if stage and child < 3:
        return f"stages.{stage}.downsample.{child}."
    return f"stages.{stage}.blocks.{child - 3 if stage else child}."


# official name -> ours, applied in order
MIXER_KEYS = [
    (r"^.*\bi?wt_filter$", ""),  # constants
    (r"\bglobal_op\.", "far."),
    (r"\bbase_scale\.", "scale."),
    (r"\bwavelet_convs\.(\d+)\.", r"wavelet.convs.\1.conv."),
    (r"\bwavelet_scale\.(\d+)\.", r"wavelet.convs.\1.scale."),
    (r"\bglobal_atten\.", "ssm."),
    (r"\bconv2d\.", "conv."),
    (r"\bout_norm\.", "norm."),
    (r"\bx_proj_weight$", "x_proj"),
    (r"\bdt_projs_weight$", "dt_proj"),
    (r"\bdt_projs_bias$", "dt_bias"),
    (r"\bA_logs$", "A_log"),
    (r"\bDs$", "D"),
    (r"\blocal_op\.(dwconv3x3|dwconv1x1|bn1|bn2)\.", lambda m: f"near.{LOCAL[m[1]]}."),
    (r"\bproj\.1\.", "proj."),
    (r"\bc\.", "conv."),
]
LOCAL = {"dwconv3x3": "0.conv", "bn1": "0.bn", "dwconv1x1": "2.conv", "bn2": "2.bn"}
KEYS = [
    *MIXER_KEYS,
    (r"^patch_embed\.", "stem.layers."),
    (r"^blocks(\d+)\.(\d+)\.", _place),
    (r"\bm\.(?:attn\.)?", "inner."),
    (r"\bpw(\d)\.", r"conv\1."),
    (r"^(head|head_dist)\.l\.", r"\1.fc."),
]

for _name, _settings in VARIANTS.items():
    _size = SIZES[_name.rsplit("_", 1)[-1]]
    register(
        MobileMamba,
        {_name: _settings},
        keys=KEYS,
        paper="2411.15941",
        origin="https://github.com/lewandofskee/MobileMamba",
        license="mit",
        timm=dict(
            first_conv="stem.layers.0.conv",
            classifier="head.fc",
            input_size=(3, _size, _size),
            pool_size=(math.ceil(_size / 64), math.ceil(_size / 64)),
        ),
    )

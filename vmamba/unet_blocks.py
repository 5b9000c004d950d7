"""Parts of convolutional U-Nets for images and volumes.

Maps are (b, c, *grid), as PyTorch's convolutions take them; a grid is (h, w), or (d, h, w) of a volume.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.mixers.bimamba import BiMamba
from vmamba.norm import LayerNorm
from vmamba.norm_act import Chain, conv_norm_act

Size = int | Sequence[int]  # of a kernel or a stride, for all sides or for each


class Layers(NamedTuple):
    """PyTorch's layers for grids of one number of sides."""

    conv: Callable[..., Any]
    up: Callable[..., Any]
    norm: Callable[..., Any]
    max_pool: Callable[..., Any]
    avg_pool: Callable[..., Any]


LAYERS = {
    2: Layers(nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d, nn.MaxPool2d, nn.AvgPool2d),
    3: Layers(nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d, nn.MaxPool3d, nn.AvgPool3d),
}
SLOPE = 0.01  # of LeakyReLU, where nnU-Net and MONAI agree
MAMBA = partial(BiMamba, scan="raster")  # forwards alone: Mamba itself


def same(kernel: Size) -> Size:
    """The padding that keeps a map's size under odd kernels."""
    return kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)


def instance_norm(axes: int, dim: int, *, affine: bool = True, device=None, dtype=None) -> nn.Module:
    """Each channel of a sample over its grid, which needs more than one pixel."""
    return LAYERS[axes].norm(dim, affine=affine, device=device, dtype=dtype)


def init_conv(module: nn.Module) -> None:
    """He's normal weights and zero bias where ``module`` is a convolution, as nnU-Net does; for ``model.apply``."""
    if isinstance(module, nn.modules.conv._ConvNd):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ChannelNorm(LayerNorm):
    """LayerNorm over the channels of (b, c, *grid)."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, c, *grid) -> (b, c, *grid)"""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class ConvResidual(nn.Module):
    """act(norm(conv(act(norm(conv(x))))) + shortcut(x)): (b, dim, *grid) -> (b, out_dim, *grid / stride).

    Args:
        axes: sides of the grid, 2 or 3.
        dim, out_dim: channels before and after.
        kernel, stride: of the first convolution; the second has stride 1.
        bias: of both.
        norm: builds a norm, ``norm(out_dim, device=..., dtype=...)``.
        shortcut: the module on the other way; x itself by default.
    """

    def __init__(
        self,
        axes: int,
        dim: int,
        out_dim: int,
        *,
        kernel: Size = 3,
        stride: Size = 1,
        bias: bool = True,
        norm: Callable[..., nn.Module],
        shortcut: nn.Module | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = LAYERS[axes].conv
        self.conv1 = conv(dim, out_dim, kernel, stride, same(kernel), bias=bias, **dd)
        self.norm1 = norm(out_dim, **dd)
        self.conv2 = conv(out_dim, out_dim, kernel, 1, same(kernel), bias=bias, **dd)
        self.norm2 = norm(out_dim, **dd)
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.act = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, *grid) -> (b, out_dim, *grid / stride)"""
        y = conv_norm_act(self.conv1, self.norm1, self.act, x)
        return conv_norm_act(self.conv2, self.norm2, self.act, y, self.shortcut(x))


class UnetrBlock(ConvResidual):
    """The residual block of UNETR's decoder: no biases, instance norms without parameters (arXiv:2103.10504).

    Args:
        axes: sides of the grid, 2 or 3.
        dim, out_dim: channels before and after; where they differ, the shortcut is a 1x1 convolution and a norm.
    """

    def __init__(self, axes: int, dim: int, out_dim: int, *, device=None, dtype=None):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = partial(instance_norm, axes, affine=False)
        shortcut = None
        if dim != out_dim:
            shortcut = Chain(LAYERS[axes].conv(dim, out_dim, 1, bias=False, **dd), norm(out_dim))
        super().__init__(axes, dim, out_dim, bias=False, norm=norm, shortcut=shortcut, **dd)


class UnetrUp(nn.Module):
    """A transposed convolution, the skip beside it, and a :class:`UnetrBlock`.

    Args:
        axes: sides of the grid, 2 or 3.
        dim, out_dim: channels of the coarse map, and of the skip and the result.
        scale: how much finer the skip is.
    """

    def __init__(self, axes: int, dim: int, out_dim: int, scale: int = 2, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.up = LAYERS[axes].up(dim, out_dim, scale, scale, bias=False, **dd)
        self.block = UnetrBlock(axes, 2 * out_dim, out_dim, **dd)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(b, dim, *grid / scale), (b, out_dim, *grid) -> (b, out_dim, *grid)"""
        return self.block(torch.cat([self.up(x), skip], 1))


class MambaLayer(nn.Module):
    """A norm and Mamba over the pixels of (b, c, *grid); their result takes the map's place.

    Autocast leaves it alone: it computes, and gives its result, in the type of its parameters.

    Args:
        dim: channels c.
        mixer: builds the mixer, ``mixer(dim, device=..., dtype=...)``: (b, *grid, c) -> (b, *grid, c).
    """

    norm: Any
    mixer: nn.Module

    def __init__(self, dim: int, *, mixer: Callable[..., nn.Module] = MAMBA, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, **dd)
        self.mixer = mixer(dim, **dd)

    def mix(self, x: Tensor) -> Tensor:
        """(b, *grid, c) -> (b, *grid, c)"""
        return self.mixer(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *grid) -> (b, c, *grid)"""
        kind = x.device.type
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            return self.mix(x.to(self.norm.weight.dtype).movedim(1, -1)).movedim(-1, 1)


register_notrace_module(MambaLayer)


# official name -> ours, of the Mamba under ``mixer`` anywhere in a network
MAMBA_KEYS = [
    (r"mixer\.(x_proj|dt_proj)\.weight$", r"mixer.\1"),
    (r"mixer\.dt_proj\.bias$", "mixer.dt_bias"),
]

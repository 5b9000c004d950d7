"""Convolutions with batch norm on channels-last maps, and how they become plain convolutions for inference.

Each ``fuse()`` returns what takes the module's place, itself or another one: the protocol of timm's
``reparameterize_model``, which walks over a network. What is folded is exact algebra on the running statistics.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from timm.models import register_notrace_module
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from vmamba.block import Conv2d, channels_first


@register_notrace_module
class ZeroBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose weight starts at 0, so that the residual branch that it ends starts as nothing."""

    gain = 0.0

    def reset_parameters(self) -> None:
        """Weight ``gain``, bias 0, statistics of a standard normal."""
        super().reset_parameters()
        nn.init.constant_(self.weight, self.gain)


class Pointwise(Conv2d):
    """A 1x1 convolution as a matrix product, or, where every channel is a group, as a product with one number each."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c')"""
        if self.groups == 1:
            return F.linear(x, self.weight.flatten(1), self.bias)
        y = x * self.weight.flatten().to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class ConvBN(nn.Module):
    """A convolution without bias and a batch norm, (b, h, w, c) -> (b, ceil(h / stride), ceil(w / stride), out_dim).

    Args:
        dim, out_dim: channels before and after.
        kernel: odd size of the convolution, padded to keep the map's size.
        stride: of the convolution.
        groups: 1, or ``dim`` for a depthwise convolution.
        bn: builds the batch norm, which sees a (b, c, h, w) view without a copy.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bn: Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = Conv2d if kernel > 1 or stride > 1 else Pointwise
        self.conv = conv(dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=False, **dd)
        self.bn = bn(out_dim, **dd)

    @property
    def weight(self) -> Tensor:
        """The convolution's weight, (out_dim, dim / groups, kernel, kernel)."""
        return self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h', w', out_dim)"""
        return channels_first(self.bn, self.conv(x))

    def fuse(self) -> nn.Module:
        """The convolution with the batch norm in its weight and bias."""
        bn = cast(Any, self.bn)
        self.conv.weight, self.conv.bias = fuse_conv_bn_weights(
            self.conv.weight, self.conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        return self.conv


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return x + self.inner(x)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Itself with ``inner`` fused; a depthwise convolution takes x too, as a 1 in the middle of its kernels."""
        reparameterize_model(self, inplace=True)
        conv = self.inner
        if not (isinstance(conv, Conv2d) and conv.groups == conv.in_channels):
            return self
        height, width = conv.kernel_size
        conv.weight[:, 0, height // 2, width // 2] += 1
        return conv


class Scale(nn.Module):
    """x times one learned number per channel.

    Args:
        dim: channels c.
        init: what the numbers start at.
    """

    def __init__(self, dim: int, *, init: float = 1.0, device=None, dtype=None):
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every number ``init``."""
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """(..., c) -> (..., c)"""
        return x * self.weight.to(x.dtype)

    @torch.no_grad()
    def into(self, conv: nn.Conv2d) -> None:
        """Multiply the output of ``conv`` instead."""
        conv.weight *= self.weight[:, None, None, None]
        if conv.bias is not None:
            conv.bias *= self.weight


@register_notrace_module
class BatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` that trains on a single vector too: it has no variance, the running statistics stand in."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, c) -> (b, c)"""
        if not self.training or len(input) > 1:
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

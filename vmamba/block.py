"""The parts that pyramid backbones share: residual block, stems, downsampling. Maps are channels-last, (b, h, w, c)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerScale, Mlp, calculate_drop_path_rates
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vmamba.kernels.backends import eager
from vmamba.norm import LayerNorm


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); both branches share one stochastic-depth rate.

    Args:
        dim: channels c.
        mixer: builds the token mixer, ``mixer(dim, device=..., dtype=...)``: (b, h, w, c) -> (b, h, w, c).
        mlp_ratio: hidden width of the MLP over c; 0 leaves the MLP out.
        layer_scale: initial factor on the branches, learned for each channel; None for no factors.
        drop_path: probability of dropping a branch for a sample.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        scale = nn.Identity if layer_scale is None else partial(LayerScale, dim, layer_scale, **dd)
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = mixer(dim, **dd)
        self.scale1, self.scale2 = scale(), scale() if mlp_ratio > 0 else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if mlp_ratio > 0:
            self.norm2 = LayerNorm(dim, **dd)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        else:
            self.norm2 = self.mlp = None

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        x = add_branch(x, self.scale1(self.mixer(self.norm1(x))), self.drop_path)
        if self.norm2 is not None and self.mlp is not None:
            x = add_branch(x, self.scale2(self.mlp(self.norm2(x))), self.drop_path)
        return x


def add_branch(x: Tensor, branch: Tensor, drop_path: nn.Module) -> Tensor:
    """x + drop_path(branch), (b, ..., c); in one pass over memory where a GPU trains, and one in the backward."""
    if not (isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob):
        return x + drop_path(branch)
    fits = eager(x, branch) and x.is_cuda and torch.promote_types(x.dtype, branch.dtype) == x.dtype
    if watched(drop_path) or not fits:
        return x + drop_path(branch)
    keep = 1 - drop_path.drop_prob
    kept = branch.new_empty((len(branch),) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
    if keep > 0 and drop_path.scale_by_keep:
        kept.div_(keep)
    return _AddProduct.apply(x, branch, kept)


class _AddProduct(torch.autograd.Function):
    """x + branch * factor; ``out`` keeps autocast from widening the branch first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dtype = branch.dtype
        return torch.addcmul(x, branch, factor, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return dy, torch.mul(dy, factor, out=torch.empty_like(dy, dtype=ctx.dtype)), None


def watched(*modules: nn.Module) -> bool:
    """Whether hooks are to run when one of these modules is called, so that it must be."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth per stage and block; it rises linearly from 0 to ``rate``."""
    return cast(list[list[float]], calculate_drop_path_rates(rate, list(depths), stagewise=True))


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights (0.02) and zero bias where ``module`` is a linear layer; for ``model.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Conv2d(nn.Conv2d):
    """A convolution over channels-last maps, (b, h, w, c) -> (b, h', w', c')."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h', w', c')"""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def channels_first(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(b, h, w, c) -> (b, h', w', c'): a layer for maps (b, c, h, w) on a channels-last map, without a copy.

    Batch norms are applied so, and not given a class of their own, because ``SyncBatchNorm.convert_sync_batchnorm`` and
    its like put other layers for (b, c, h, w) in their place.
    """
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ChannelsFirst(nn.Sequential):
    """Layers for maps (b, c, h, w) on channels-last maps, as :func:`channels_first` applies them."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h', w', c')"""
        return channels_first(super().forward, input)


def channels_last(image: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h, w, c), contiguous"""
    if torch.compiler.is_dynamo_compiling():  # plain sizes now, as the scans need later: traced 2.5 times as fast
        _ = [range(side).stop for side in image.shape[2:]]
    return image.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


class PatchStem(nn.Module):
    """Stride 4, or that of another ``patch``, in one step: a convolution of patches and a norm."""

    def __init__(self, in_chans: int, dim: int, *, patch: int = 4, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = Conv2d(in_chans, dim, patch, patch, **dd)
        self.norm1 = LayerNorm(dim, wide=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, floor(h / patch), floor(w / patch), dim)"""
        return self.norm1(self.conv1(channels_last(x)))


class ConvStem(nn.Module):
    """Stride 4 in two steps: 3x3 convolutions with stride 2, each with a norm, GELU between them."""

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.norm1 = LayerNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm2 = LayerNorm(dim, wide=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, ceil(h / 4), ceil(w / 4), dim)"""
        x = self.act(self.norm1(self.conv1(channels_last(x))))
        return self.norm2(self.conv2(x))


class PatchMerging(nn.Module):
    """Stride 2: the four pixels of each 2x2 patch side by side, norm, linear (Swin; odd maps are padded with zeros)."""

    def __init__(self, dim: int, out_dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, ceil(h / 2), ceil(w / 2), out_dim)"""
        h, w = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        patches = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(patches, -1)))


class ConvDownsample(nn.Module):
    """Stride 2: a 3x3 convolution and a norm."""

    def __init__(self, dim: int, out_dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = Conv2d(dim, out_dim, 3, 2, 1, **dd)
        self.norm = LayerNorm(out_dim, wide=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, ceil(h / 2), ceil(w / 2), out_dim)"""
        return self.norm(self.conv(x))

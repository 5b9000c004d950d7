"""The parts that pyramid backbones share: residual block, stems, downsampling. Maps are channels-last, (b, h, w, c)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerScale, calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.kernels.backends import eager, inlines
from vmamba.mlp import Mlp
from vmamba.narrow import FUNCTIONAL, Layer, eager_or_compiled, narrow_together, watched
from vmamba.norm import LayerNorm
from vmamba.residual import add_branch_then_norm

FEW = 3  # pixels: so many times fewer of a convolution's result than channels


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); both branches share one stochastic-depth rate.

    Args:
        dim: channels c.
        mixer: builds the token mixer, ``mixer(dim, device=..., dtype=...)``: (b, h, w, c) -> (b, h, w, c).
        mlp_ratio: hidden width of the MLP over c; 0 leaves the MLP out.
        layer_scale: initial factor on the branches, learned for each channel; None for no factors.
        drop_path: probability of dropping a branch for a sample.
        device, dtype: of the parameters.
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

    @torch.compiler.assume_constant_result
    def steps(self) -> bool:
        """Whether to call :meth:`step` is the same as to call the block."""
        return type(self) is Block and not watched(self)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return self.step(x, self.norm1(x), None, {})[0]

    def step(
        self, x: Tensor, y: Tensor, norm: nn.Module | None, calls: Mapping[nn.Module, Layer]
    ) -> tuple[Tensor, Tensor]:
        """The stream x with y = norm1(x) -> the stream after this block, and ``norm`` of it (itself for None).

        ``calls`` says how mixer and MLP are called, where that is not as modules (:func:`narrow_together`).
        """
        mixer, mlp, norm2, drop_path = self.mixer, self.mlp, self.norm2, self.drop_path
        branch = self.scale1(calls.get(mixer, mixer)(y))
        if norm2 is not None and mlp is not None:
            x, y = add_branch_then_norm(x, branch, drop_path, norm2)
            branch = self.scale2(calls.get(mlp, mlp)(y))
        return add_branch_then_norm(x, branch, drop_path, norm)


def run_blocks(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """``blocks(x)``; what a block adds to the stream and the norm of the next one are one step where they can be."""
    every = [block for block in blocks if isinstance(block, Block) and block.steps()]
    if not every or len(every) < len(blocks) or watched(blocks) or not eager_or_compiled(x):
        return blocks(x)  # a hook, a wrapper, or whoever traces, is to see each block
    norms = [block.norm1 for block in every[1:]] + [None]
    calls = narrow_together(x, [part for block in every for part in (block.mixer, block.mlp) if part is not None])
    y = cast(Tensor, every[0].norm1(x))
    for block, norm in zip(every, norms, strict=True):
        x, y = block.step(x, y, norm, calls)
    return x


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth per stage and block; it rises linearly from 0 to ``rate``."""
    return cast(list[list[float]], calculate_drop_path_rates(rate, list(depths), stagewise=True))


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights (0.02) and zero bias where ``module`` is a linear layer; for ``model.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def reset_parameters(model: nn.Module) -> None:
    """Start every module of ``model`` afresh that has a ``reset_parameters``."""
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()


class Conv2d(nn.Conv2d):
    """A convolution over channels-last maps, (b, h, w, c) -> (b, h', w', c')."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h', w', c')"""
        return self._product(x) if self._outweighs(x) else self.filtered(x, self.weight, self.bias)

    def _outweighs(self, x: Tensor) -> bool:
        """Whether a product takes less time: on a CPU, where PyTorch takes longer to lay the weights out as the map is
        than to filter its few pixels; in compiled code on a GPU, which launches it sooner than cuDNN does.
        """
        if self.groups > 1 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        if inlines(x):
            return len(x) > 0
        if not (eager(x, self.weight) and x.is_cpu and len(x)):
            return False
        pixels = len(x) * (x.shape[1] // self.stride[0]) * (x.shape[2] // self.stride[1])
        return self.out_channels >= FEW * pixels and max(self.kernel_size) > 1 and self.weight.is_contiguous()

    def _product(self, x: Tensor) -> Tensor:
        """The same as a product of the map's patches with the weights as they lie in memory."""
        k, dilation, padding, stride = self.kernel_size, self.dilation, cast(Any, self.padding), self.stride
        patches = F.unfold(x.permute(0, 3, 1, 2), k, dilation, padding, stride)
        rows = (x.shape[1] + 2 * padding[0] - dilation[0] * (k[0] - 1) - 1) // stride[0] + 1
        return F.linear(patches.mT, self.weight.flatten(1), self.bias).unflatten(1, (rows, -1))

    def filtered(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with another weight and bias."""
        return self._conv_forward(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)


register_notrace_module(Conv2d)  # FX keeps it whole; as a decorator it would hide the class from type checkers
FUNCTIONAL[Conv2d] = lambda conv, **cast: partial(conv.filtered, **cast)


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

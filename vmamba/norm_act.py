"""A convolution, its instance norm and what follows them, in fewer passes over memory on a GPU.

A residual is added and LeakyReLU applied in the norm's own passes. The bias of a convolution is left out before a norm,
which takes constants off: it changes nothing, and its gradient is 0.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from vmamba.kernels.backends import eager
from vmamba.kernels.instance_norm import FORMATS, instance_norm
from vmamba.narrow import HALF, watched
from vmamba.precision import autocasts

AXES = {nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}  # norms -> sides of their grids
CONVOLUTIONS = {nn.Conv2d, nn.Conv3d}
ACTS = {nn.LeakyReLU}


def conv_norm_act(
    conv: nn.Module, norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """act(norm(conv(x)) + residual); the modules are called where they or the tensors are watched, and on a CPU.

    Args:
        conv: (b, dim, *grid) -> (b, c, *grid). norm, act: the same shape before and after; no act for None.
        x: (b, dim, *grid). residual: like the result.
    """
    if not (_direct(x) and _needless(conv, norm)):
        return norm_act(norm, act, conv(x), residual)
    layer = cast(nn.Conv3d, conv)
    y = layer._conv_forward(x, layer.weight, None)
    return norm_act(norm, act, _Without.apply(y, layer.bias), residual)


def norm_act(norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """act(norm(x) + residual), (b, c, *grid), as :func:`conv_norm_act`."""
    if _direct(x) and _fits(norm, act, x, residual):
        known = cast(nn.InstanceNorm3d, norm)
        slope = 1.0 if act is None else cast(nn.LeakyReLU, act).negative_slope
        return instance_norm(x, known.weight, known.bias, residual=residual, eps=known.eps, slope=slope)
    y = norm(x)
    y = y if residual is None else y + residual
    return y if act is None else act(y)


def laid_out(x: Tensor) -> Tensor:
    """x, channels-last where the convolutions that follow compute so: on a GPU in half precision."""
    if not (_direct(x) and (x.dtype in HALF or autocasts(x.device.type)) and x.ndim in FORMATS):
        return x
    x = x.contiguous(memory_format=FORMATS[x.ndim])
    if x.shape[1] > 1:
        return x
    return x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:]))  # of one channel, which may lie either way, too


def _direct(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.is_cuda and eager(x)


def _fits(norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None) -> bool:
    """Whether these are modules and shapes that :func:`instance_norm` knows, and no hook wants to see them called."""
    modules = (norm,) if act is None else (norm, act)
    if AXES.get(type(norm)) != x.ndim - 2 or not (act is None or type(act) in ACTS) or watched(*modules):
        return False
    layer, slope = cast(nn.InstanceNorm3d, norm), getattr(act, "negative_slope", 1)
    shaped = x.shape[1] == layer.num_features and x.shape[2:].numel() > 1 and x.numel() > 0
    alike = residual is None or (residual.shape == x.shape and residual.device == x.device)
    return shaped and alike and 0 <= slope <= 1 and not layer.track_running_stats


def _needless(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the norm takes off the bias that the convolution adds, and no hook wants to see what it gives."""
    known = type(conv) in CONVOLUTIONS and type(norm) in AXES and not watched(conv, norm)
    return known and conv.bias is not None and not cast(nn.InstanceNorm3d, norm).track_running_stats


class _Without(torch.autograd.Function):
    """x itself; the bias, which would change nothing, has a gradient of 0, as optimizers and DDP want one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.bias = bias.shape, bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.bias
        return dx, dx.new_zeros(shape, dtype=dtype)


class Chain(nn.Sequential):
    """Layers one after the other; a convolution, an instance norm and LeakyReLU in a row as :func:`conv_norm_act`."""

    def forward(self, input: Tensor) -> Tensor:
        """What the first layer takes -> what the last gives."""
        layers, x = [*self], input
        while layers:
            kinds = CONVOLUTIONS, AXES, ACTS
            conv, norm, act = (layers.pop(0) if layers and type(layers[0]) in kind else None for kind in kinds)
            if norm is not None:
                x = norm_act(norm, act, x) if conv is None else conv_norm_act(conv, norm, act, x)
            else:
                for layer in [m for m in (conv, act) if m is not None] or [layers.pop(0)]:
                    x = layer(x)
        return x

"""Instance normalisation (arXiv:1607.08022) and what follows it in a residual block:

z = (x - mean) / sqrt(var + eps) weight + bias + residual,  y = z where z > 0, else slope z

Mean and variance are those of a channel over the grid of one sample.
"""

import torch
from torch import Tensor

from vmamba.kernels import instance_norm_reference as reference
from vmamba.kernels.backends import choose, eager

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # of maps with so many axes


def is_channels_last(x: Tensor) -> bool:
    """Whether a map (b, c, *grid) lies in memory as (b, *grid, c), and not as it is written."""
    form = FORMATS.get(x.ndim)
    return form is not None and x.is_contiguous(memory_format=form) and not x.is_contiguous()


def instance_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    slope: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Normalise each channel of each sample, add a residual, apply LeakyReLU.

    Args:
        x: (b, c, *grid) of more than one pixel; computed in float32 at least.
        weight, bias: (c,), both or neither.
        residual: (b, c, *grid).
        eps: added to the variance.
        slope: of LeakyReLU below zero, from 0 (ReLU) to 1 (none).
        backend: ``cuda``, ``triton`` (channels-last maps), ``reference``, or None for the best that takes these.

    Returns:
        (b, c, *grid) in the wider type of x and the residual, laid out as x; differentiable, once on a GPU.

    Raises:
        ValueError: shapes do not fit, or there is one pixel only; RuntimeError: the chosen backend cannot take these
            tensors.
    """
    if x.ndim < 3 or x.shape[2:].numel() < 2 or not 0 <= slope <= 1:
        raise ValueError(f"x must be (b, c, *grid) of more than one pixel, slope 0 to 1, got {tuple(x.shape)}, {slope}")
    shapes = [None if t is None else t.shape for t in (weight, bias)]
    if shapes not in ([None, None], [x.shape[1:2]] * 2) or (residual is not None and residual.shape != x.shape):
        got = [None if t is None else tuple(t.shape) for t in (x, residual, weight, bias)]
        raise ValueError(f"x, residual, weight, bias must be (b, c, *grid), the same, (c,), (c,), got {got}")
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    watched = not backend and not eager(*tensors)  # by a compiler, which fuses PyTorch's own, or by a transform
    module = reference if watched else choose("instance_norm", backend or "", *tensors)
    return module.forward(x, residual, weight, bias, eps, slope)

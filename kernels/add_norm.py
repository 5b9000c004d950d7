"""A residual stream and its norm in one step: what a block of a column begins with (Vim, arXiv:2401.09417).

r' = r + h,  x = weight (r' - mean) / sqrt(var + eps) + bias    (LayerNorm)
             x = weight r' / sqrt(mean of squares + eps)         (RMSNorm, arXiv:1910.07467)
"""

import torch
from torch import Tensor

from vmamba.kernels import add_norm_reference
from vmamba.kernels.add_norm_reference import Norm
from vmamba.kernels.backends import choose, plain


def add_norm(h: Tensor, r: Tensor | None, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream, and normalise the stream for the next block.

    Args:
        h: (..., c), the output. r: (..., c), the stream; None before the first block, where it is h.
        norm: the norm's parameters. dtype: of the normalised stream.

    Returns:
        x (..., c) in ``dtype``, and the stream (..., c) in the wider one of h's and r's types and float32.

    Raises:
        ValueError: shapes do not fit.
    """
    shape = None if r is None else r.shape
    if shape not in (None, h.shape) or norm.weight.shape != h.shape[-1:]:
        got = f"{tuple(h.shape)}, {shape and tuple(shape)} and {tuple(norm.weight.shape)}"
        raise ValueError(f"h, r and the norm's weight must be (..., c), (..., c) or None and (c,), got {got}")
    tensors = [t for t in (h, r, norm.weight, norm.bias) if t is not None]
    if plain(*tensors):
        return choose("add_norm", "", *tensors).forward(h, r, norm, dtype)
    return add_norm_reference.forward(h, r, norm, dtype)  # has gradients

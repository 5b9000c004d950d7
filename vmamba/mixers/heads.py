"""What mixers share: dividing channels into heads, and the initial step sizes of Mamba."""

import math

import torch
from torch import Tensor


def count_heads(dim: int, expand: float, head_dim: int) -> int:
    """Heads of ``head_dim`` channels in d = expand * dim channels.

    Raises:
        ValueError: d is not a multiple of ``head_dim``.
    """
    inner = int(expand * dim)
    if inner % head_dim or not inner:
        raise ValueError(f"{inner} inner channels (expand {expand} of {dim}) do not divide into heads of {head_dim}")
    return inner // head_dim


@torch.no_grad()
def init_step_bias(bias: Tensor, low: float = 1e-3, high: float = 0.1) -> None:
    """Fill ``bias`` so that softplus(bias) is log-uniform from ``low`` to ``high`` (Mamba, arXiv:2312.00752, 3.6)."""
    step = torch.empty_like(bias).uniform_(math.log(low), math.log(high)).exp().clamp(min=1e-4)
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

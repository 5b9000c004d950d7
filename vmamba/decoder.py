"""Parts of decoders that work on maps as backbones make them, (b, h, w, c)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.block import drop_path_rates
from vmamba.norm import LayerNorm


class PatchExpand(nn.Module):
    """(b, h, w, c) -> (b, scale h, scale w, out_dim): a linear layer spreads each pixel over a patch, then a norm."""

    def __init__(self, dim: int, out_dim: int, scale: int = 2, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale = scale
        self.expand = nn.Linear(dim, scale * scale * out_dim, bias=False, **dd)
        self.norm = LayerNorm(out_dim, wide=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, scale h, scale w, out_dim)"""
        return self.norm(spread(self.expand(x), self.scale))


def spread(x: Tensor, scale: int) -> Tensor:
    """(b, h, w, scale scale c) -> (b, scale h, scale w, c): the channels of a pixel, patch row first, as a patch."""
    patches = x.unflatten(-1, (scale, scale, -1))  # (b, h, w, p1, p2, c)
    return patches.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def falling_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth per stage and block of a decoder: it falls linearly from ``rate`` to 0."""
    return [rates[::-1] for rates in drop_path_rates(rate, depths[::-1])[::-1]]


class Fusion(nn.Module):
    """A map made finer, the skip beside it, a linear layer and blocks; maps are (b, h, w, c).

    Args:
        dim, out_dim: channels of the coarse map, and of the skip and the result.
        scale: how much finer the skip is.
        blocks: what follows.
        expand: builds what makes the map finer, ``expand(dim, out_dim, scale, device=..., dtype=...)``.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        scale: int,
        blocks: Sequence[nn.Module],
        *,
        expand: Callable[..., nn.Module] = PatchExpand,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.expand = expand(dim, out_dim, scale, **dd)
        self.reduce = nn.Linear(2 * out_dim, out_dim, **dd)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(b, h, w, dim), (b, scale h, scale w, out_dim) -> (b, scale h, scale w, out_dim)"""
        return self.blocks(self.reduce(torch.cat([self.expand(x), skip], -1)))

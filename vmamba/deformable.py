"""Multi-scale deformable attention in plain PyTorch (Deformable DETR, arXiv:2010.04159, section 4.1)."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.tokens import Grid


def centres(grids: Sequence[Grid], like: Tensor) -> Tensor:
    """(q, 2): x and y of all pixels, one grid after the other, row by row, where a map spans [0, 1] x [0, 1].

    In the type of ``like``, float32 at least, and on its device.
    """
    points = []
    for h, w in grids:
        y, x = (torch.arange(n, device=like.device, dtype=_wide(like)) + 0.5 for n in (h, w))
        points.append(torch.stack([(x / w).expand(h, w), (y / h)[:, None].expand(h, w)], -1).flatten(0, 1))
    return torch.cat(points)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class DeformableAttention(nn.Module):
    """Each query reads p points around its place on each of n levels, for every head where and how much it says.

        y[q] = W_out concat_heads sum over levels i, points j of a[q, i, j] V[i](place[q] + offset[q, i, j] / size[i])

    a is a softmax over levels and points together; V = W_value x, read bilinearly, with zeros outside.

    Args:
        dim: channels c of queries, values and results.
        levels: number n of maps that are read.
        heads: number of heads.
        points: number p of points for each head and level.
        ratio: channels of the values over c.

    Raises:
        ValueError: the channels of the values do not divide into the heads.
    """

    def __init__(
        self, dim: int, *, levels: int, heads: int, points: int = 4, ratio: float = 1.0, device=None, dtype=None
    ):
        super().__init__()
        inner = int(dim * ratio)
        if inner % heads:
            raise ValueError(f"{inner} channels of the values (ratio {ratio:g}) do not divide into {heads} heads")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2, **dd)
        self.attention_weights = nn.Linear(dim, heads * levels * points, **dd)
        self.value_proj = nn.Linear(dim, inner, **dd)
        self.output_proj = nn.Linear(inner, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point j starts j steps from the place, each head in a direction of its own; all points weigh the same."""
        for linear in (self.sampling_offsets, self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)
        bias = self.sampling_offsets.bias
        with torch.no_grad():
            angle = torch.arange(self.heads, device=bias.device) * (2 * math.pi / self.heads)
            ring = torch.stack([angle.cos(), angle.sin()], -1)
            ring = ring / ring.abs().amax(-1, keepdim=True)  # on the border of a square
            steps = torch.arange(1, self.points + 1, device=bias.device)
            offsets = ring[:, None, None] * steps[:, None]  # (heads, 1, points, 2)
            bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())

    def forward(self, query: Tensor, places: Tensor, value: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Queries (b, q, c) at places (q, 2), maps one after the other (b, l, c) of ``grids`` -> (b, q, c)"""
        wide = _wide(value)
        shape = self.heads, self.levels, self.points
        offsets = self.sampling_offsets(query).to(wide).unflatten(-1, (*shape, 2))
        weights = self.attention_weights(query).to(wide).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, shape[1:]).unbind(3)
        sizes = [h * w for h, w in grids]
        maps = self.value_proj(value).to(wide).unflatten(-1, (self.heads, -1)).split(sizes, 1)  # (b, h * w, heads, d)
        levels = zip(grids, maps, offsets.unbind(3), weights, strict=True)
        total = sum(_read(y.unflatten(1, grid), places, offset, weight) for grid, y, offset, weight in levels)
        return self.output_proj(cast(Tensor, total).flatten(2).to(query.dtype))


def _read(maps: Tensor, places: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Maps (b, h, w, g, d) of g heads, places (q, 2), offsets (b, q, g, p, 2), weights (b, q, g, p) -> (b, q, g, d)"""
    h, w, heads = maps.shape[1:4]
    dx, dy = offsets.unbind(-1)
    found = places[:, None, None] + torch.stack([dx / w, dy / h], -1)
    grid = found.transpose(1, 2).flatten(0, 1) * 2 - 1  # (b * heads, q, p, 2)
    read = F.grid_sample(maps.permute(0, 3, 4, 1, 2).flatten(0, 1), grid, align_corners=False)
    return torch.einsum("bhdqp,bqhp->bqhd", read.unflatten(0, (-1, heads)), weights)

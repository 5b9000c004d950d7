"""ViT-Adapter (arXiv:2205.08534): a column of blocks and a small convolutional pyramid that exchange what they see."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.block import Conv2d
from vmamba.columnar import Columnar, quarters
from vmamba.deformable import DeformableAttention, centres
from vmamba.images import check_image
from vmamba.tokens import Grid

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
STRIDES = (4, 8, 16, 32)


class ConvReLU(nn.Sequential):
    """A 3x3 convolution without bias, batch norm and ReLU: (b, c, h, w) -> (b, c', ceil(h / stride), ceil(w / stride)).

    Its batch norms become synchronised ones by ``nn.SyncBatchNorm.convert_sync_batchnorm``.
    """

    def __init__(self, from_channels: int, to_channels: int, stride: int = 2, *, device=None, dtype=None):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = nn.Conv2d(from_channels, to_channels, 3, stride, 1, bias=False, **dd)
        super().__init__(conv, nn.BatchNorm2d(to_channels, **dd), nn.ReLU())


class SpatialPrior(nn.Module):
    """Image (b, in_chans, H, W) -> maps (b, dim, H / s, W / s) at strides 4, 8, 16, 32 by convolutions alone.

    Args:
        in_chans: channels of the image. dim: channels of all maps.
        width: channels of the first convolutions.
    """

    def __init__(self, in_chans: int, dim: int, *, width: int = 64, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        first = ConvReLU(in_chans, width, **dd), ConvReLU(width, width, 1, **dd), ConvReLU(width, width, 1, **dd)
        self.stem = nn.Sequential(*first, nn.MaxPool2d(3, 2, 1))
        self.steps = nn.ModuleList(ConvReLU(width * a, width * b, **dd) for a, b in ((1, 2), (2, 4), (4, 4)))
        self.proj = nn.ModuleList(nn.Conv2d(width * a, dim, 1, **dd) for a in (1, 2, 4, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, H, W) -> [(b, dim, ceil(H / s), ceil(W / s)), ...]"""
        maps = accumulate(self.steps, lambda y, step: step(y), initial=self.stem(x))
        return [proj(y) for proj, y in zip(self.proj, maps, strict=True)]


class ConvFFN(nn.Module):
    """Linear layer, a depthwise 3x3 convolution on each level (one kernel for all), GELU, linear layer.

    Args:
        dim: channels c. hidden: channels between.
    """

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(b, l, c), the maps of ``grids`` one after the other -> (b, l, c)"""
        levels = self.fc1(x).split([h * w for h, w in grids], 1)
        levels = [self.dwconv(y.unflatten(1, grid)).flatten(1, 2) for y, grid in zip(levels, grids, strict=True)]
        return self.fc2(F.gelu(torch.cat(levels, 1)))


class CrossAttention(nn.Module):
    """attention(norm(query), norm(value)): deformable attention from tokens on some grids to tokens on others.

    Args:
        dim: channels c.
        attention: builds the attention, ``attention(dim, device=..., dtype=...)``, as :class:`DeformableAttention`.
    """

    def __init__(self, dim: int, attention: Callable[..., nn.Module], *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_norm, self.feat_norm = LayerNorm(dim, **dd), LayerNorm(dim, **dd)
        self.attn = attention(dim, **dd)

    def forward(self, query: Tensor, query_grids: Sequence[Grid], value: Tensor, value_grids: Sequence[Grid]) -> Tensor:
        """(b, q, c), (b, l, c) -> (b, q, c)"""
        places = centres(query_grids, query)
        return self.attn(self.query_norm(query), places, self.feat_norm(value), value_grids)


class Injector(CrossAttention):
    """Tokens x of the column take from the pyramid c: x + gamma * attention(x, c); gamma starts at 0."""

    def __init__(self, dim: int, attention: Callable[..., nn.Module], *, device=None, dtype=None):
        super().__init__(dim, attention, device=device, dtype=dtype)
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma = 0, so that a pretrained column starts as it was."""
        nn.init.zeros_(self.gamma)

    def forward(self, query: Tensor, query_grids: Sequence[Grid], value: Tensor, value_grids: Sequence[Grid]) -> Tensor:
        """(b, q, c), (b, l, c) -> (b, q, c)"""
        return query + self.gamma * super().forward(query, query_grids, value, value_grids)


class Extractor(CrossAttention):
    """The pyramid c takes from the tokens x of the column: c + attention(c, x), then c + ffn(norm(c)).

    Args:
        dim: channels. attention: see :class:`CrossAttention`.
        ffn_ratio: hidden channels of the ffn over ``dim``.
        drop_path: probability of dropping the ffn for a sample.
    """

    def __init__(
        self,
        dim: int,
        attention: Callable[..., nn.Module],
        *,
        ffn_ratio: float = 0.25,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, attention, device=device, dtype=dtype)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ffn = ConvFFN(dim, int(dim * ffn_ratio), **dd)
        self.ffn_norm = LayerNorm(dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, query: Tensor, query_grids: Sequence[Grid], value: Tensor, value_grids: Sequence[Grid]) -> Tensor:
        """(b, q, c), (b, l, c) -> (b, q, c)"""
        query = query + super().forward(query, query_grids, value, value_grids)
        return query + self.drop_path(self.ffn(self.ffn_norm(query), query_grids))


class ViTAdapter(nn.Module):
    """Image (b, in_chans, H, W) -> maps (b, dim, H / s, W / s) at strides 4, 8, 16, 32, for any column at stride 16.

    Before each quarter of the blocks the column takes from the pyramid, after it the pyramid takes from the column.
    The results are the pyramid's maps and the column's tokens after each quarter, resized, added, and batch-normalised.
    Of a block's pair (h, r) only h takes part; the residual stream r stays within the column.

    Args:
        body: a column of blocks; its classifier, final norm and class tokens are dropped.
        heads, points, ratio: of the deformable attention; see :class:`DeformableAttention`.
        width: channels of the first convolutions.
        ffn_ratio, drop_path: of the extractors; see :class:`Extractor`.

    Raises:
        ValueError: the column is not at stride 16, or has less than 4 blocks.
    """

    def __init__(
        self,
        body: Columnar,
        *,
        heads: int = 6,
        points: int = 4,
        ratio: float = 0.5,
        width: int = 64,
        ffn_ratio: float = 0.25,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if body.stem.stride != 16 or len(body.blocks) < len(STRIDES):
            got = f"{len(body.blocks)} at stride {body.stem.stride}"
            raise ValueError(f"ViTAdapter needs a column of at least {len(STRIDES)} blocks at stride 16, got {got}")
        dim, weight = body.channels[-1], body.stem.proj.weight
        self.ends = tuple(body.prune_intermediate_layers(list(quarters(len(body.blocks))), prune_norm=True))
        body.drop_class_tokens()
        self.body, self.channels, self.strides = body, (dim,) * len(STRIDES), STRIDES
        dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        attention = partial(DeformableAttention, heads=heads, points=points, ratio=ratio)
        to_body, to_maps = partial(attention, levels=len(STRIDES) - 1), partial(attention, levels=1)
        extractor = partial(Extractor, dim, to_maps, ffn_ratio=ffn_ratio, drop_path=drop_path, **dd)
        self.prior = SpatialPrior(body.in_chans, dim, width=width, **dd)
        self.level_embed = nn.Parameter(torch.empty(len(STRIDES) - 1, dim, **dd))
        self.injectors = nn.ModuleList(Injector(dim, to_body, **dd) for _ in self.ends)
        extra = [0] * (len(self.ends) - 1) + [2]
        self.extractors = nn.ModuleList(nn.ModuleList(extractor() for _ in range(1 + n)) for n in extra)
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2, **dd)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim, **dd) for _ in STRIDES)
        outside = [(r"^(norm|head)\..*", ""), (r"^(?=stem\.|blocks\.)", "body.")]
        self.official_keys = [*KEYS, *getattr(body, "official_keys", ()), *outside]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal level embeddings."""
        nn.init.normal_(self.level_embed)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, H, W) -> [(b, dim, ceil(H / s), ceil(W / s)), ...], contiguous"""
        finest, *coarse = self.prior(check_image(x, self.body.in_chans, self.body.least_side))
        grids = [(y.shape[2], y.shape[3]) for y in coarse]
        c = torch.cat([y.flatten(2).mT + e for y, e in zip(coarse, self.level_embed, strict=True)], 1)
        c, outs = self._interact(x, c, grids)
        coarse = [y.mT.unflatten(2, grid) for y, grid in zip(c.split([h * w for h, w in grids], 1), grids, strict=True)]
        finest = finest + self.up(coarse[0])[:, :, : finest.shape[2], : finest.shape[3]]
        maps = zip(self.norms, (finest, *coarse), outs, strict=True)
        return [norm(y + _resized(out, y)).contiguous() for norm, y, out in maps]

    def _interact(self, x: Tensor, c: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, list[Tensor]]:
        """The pyramid c (b, l, dim) after all interactions, and the column's map (b, dim, h, w) after each."""
        state, outs, start = self.body.begin(x), [], 0
        for injector, extractors, end in zip(self.injectors, self.extractors, self.ends, strict=True):
            h, r, grid, mixers = state
            state = injector(h, [grid], c, grids), r, grid, mixers
            for block in self.body.blocks[start : end + 1]:
                state = self.body.advance(block, state)
            for extractor in cast(nn.ModuleList, extractors):
                c = extractor(c, grids, state[0], [grid])
            outs.append(self.body.stem.to_map(state[0], grid).permute(0, 3, 1, 2))
            start = end + 1
        return c, outs


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, c, h', w') of ``like``, bilinearly"""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


# official name -> ours, applied in order
KEYS = [
    (r"^spm\.stem\.(\d)\.", lambda m: f"prior.stem.{int(m[1]) // 3}.{int(m[1]) % 3}."),
    (r"^spm\.conv(\d)\.", lambda m: f"prior.steps.{int(m[1]) - 2}."),
    (r"^spm\.fc(\d)\.", lambda m: f"prior.proj.{int(m[1]) - 1}."),
    (r"^interactions\.(\d+)\.injector\.", r"injectors.\1."),
    (r"^interactions\.(\d+)\.extractor\.", r"extractors.\1.0."),
    (r"^interactions\.(\d+)\.extra_extractors\.(\d+)\.", lambda m: f"extractors.{m[1]}.{int(m[2]) + 1}."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^norm(\d)\.", lambda m: f"norms.{int(m[1]) - 1}."),
]

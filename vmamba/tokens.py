"""An image as a sequence of tokens: patches with positions, and class (or register) tokens anywhere among them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import lecun_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.scans import Scan, find_routes

Grid = tuple[int, int]


def first(patches: int, count: int) -> list[int]:
    """Class tokens before all patches (ViT, ShuffleMamba)."""
    return list(range(count))


def middle(patches: int, count: int) -> list[int]:
    """Class tokens in the middle, after floor(patches / 2) patches (Vim)."""
    return list(range(patches // 2, patches // 2 + count))


def ends(patches: int, count: int) -> list[int]:
    """Half of the class tokens before all patches, the other half (or the one more) behind them."""
    return [*range(count // 2), *range(patches + count // 2, patches + count)]


def spread(patches: int, count: int) -> list[int]:
    """Each token after as many patches as the others; the rest follows the last (Mamba-Reg, arXiv:2405.14858)."""
    segment = patches // (count + 1)
    return [segment + i * (segment + 1) for i in range(count)]


@dataclass(frozen=True)
class ClassTokens:
    """How many tokens stand among the patches, and where: ``place(patches, count)`` gives their positions, ascending.

    >>> ClassTokens(2, spread).place(6, 2)
    [2, 5]
    """

    count: int = 1
    place: Callable[[int, int], list[int]] = first

    def insert(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """(b, m, c), (b, count, c) -> (b, m + count, c)"""
        pieces, start = [], 0
        for i, position in enumerate(self.place(patches.shape[1], self.count)):
            pieces += [patches[:, start : position - i], tokens[:, i : i + 1]]
            start = position - i
        return torch.cat([*pieces, patches[:, start:]], 1) if pieces else patches

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, m + count, c) -> (b, m, c), (b, count, c): the reverse of :meth:`insert`."""
        return self.patches(x), self.tokens(x)

    def patches(self, x: Tensor) -> Tensor:
        """(b, m + count, c) -> (b, m, c)"""
        places = self.place(x.shape[1] - self.count, self.count)
        starts, stops = [0, *(p + 1 for p in places)], [*places, x.shape[1]]
        pieces = [x[:, start:stop] for start, stop in zip(starts, stops, strict=True)]
        return torch.cat(pieces, 1) if places else x

    def tokens(self, x: Tensor) -> Tensor:
        """(b, m + count, c) -> (b, count, c)"""
        places = self.place(x.shape[1] - self.count, self.count)
        return torch.cat([x[:, :0], *(x[:, p : p + 1] for p in places)], 1)


NO_CLASS_TOKENS = ClassTokens(0)


def resize_positions(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """(1, h * w, c) for the grid ``old`` -> (1, h' * w', c) for ``new``: bicubic, no change where they are equal."""
    if old == new:
        return table
    image = table.unflatten(1, old).permute(0, 3, 1, 2).to(torch.promote_types(table.dtype, torch.float32))
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return image.flatten(2).mT.to(table.dtype)


class PatchConv(nn.Conv2d):
    """The convolution that makes a token of a patch; LeCun normal weights, zero bias.

    On a GPU patches that do not overlap go through one matrix product, and the result lies channels-last.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(b, in_chans, H, W) -> (b, c, h, w)"""
        p, q = self.kernel_size
        if not input.is_cuda or self.stride != self.kernel_size:
            return super().forward(input)
        h, w = input.shape[2] // p, input.shape[3] // q
        patches = input[:, :, : h * p, : w * q].unflatten(3, (w, q)).unflatten(2, (h, p))
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (b, h, w, in_chans, p, q)
        dtype = input.dtype
        if torch.is_autocast_enabled("cuda") and dtype == torch.float32:
            dtype = torch.get_autocast_dtype("cuda")
        rows = patches.to(dtype, memory_format=torch.contiguous_format).flatten(3)
        return F.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def reset_parameters(self) -> None:
        """LeCun normal weights, cut at two deviations; zero bias."""
        lecun_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class TokenEmbed(nn.Module):
    """Image (b, in_chans, H, W) -> tokens (b, h * w + n, c), row by row, and their grid (h, w).

    Positions are learned for the grid of ``img_size`` and resized for every other, so that any image of at least one
    patch will do.

    Args:
        in_chans: channels of the image. dim: channels c.
        img_size: side of the image, or (height, width).
        patch: side of a patch in pixels. stride: pixels from patch to patch; as ``patch`` by default.
        class_tokens: further tokens and where they stand; none by default.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        img_size: int | Sequence[int] = 224,
        patch: int = 16,
        stride: int | None = None,
        class_tokens: ClassTokens = NO_CLASS_TOKENS,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch, self.stride, self.class_tokens = patch, stride or patch, class_tokens
        self.grid = self.grid_of(*_sides(img_size))
        self.proj = PatchConv(in_chans, dim, patch, self.stride, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), dim, **dd))
        none, extra = class_tokens.count == 0, (1, class_tokens.count, dim)
        self.cls_token = None if none else nn.Parameter(torch.empty(extra, **dd))
        self.cls_pos = None if none else nn.Parameter(torch.empty(extra, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal (0.02) for positions and class tokens."""
        for parameter in (self.pos_embed, self.cls_token, self.cls_pos):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def grid_of(self, height: int, width: int) -> Grid:
        """Patches in each direction of an image.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        if height < self.patch or width < self.patch:
            raise ValueError(f"images must be at least {self.patch} x {self.patch} pixels, got {height} x {width}")
        return (height - self.patch) // self.stride + 1, (width - self.patch) // self.stride + 1

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """(b, in_chans, H, W) -> (b, h * w + n, c), (h, w)"""
        grid = self.grid_of(*x.shape[2:])
        patches = self.proj(x).flatten(2).mT
        patches = patches + resize_positions(self.pos_embed, self.grid, grid)
        if self.cls_token is None or self.cls_pos is None:
            return patches, grid
        tokens = (self.cls_token + self.cls_pos).to(patches.dtype)
        return self.class_tokens.insert(patches, tokens.expand(patches.shape[0], -1, -1)), grid

    def to_map(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(b, h * w + n, c) -> (b, h, w, c): the patches alone."""
        return self.class_tokens.patches(tokens).unflatten(1, grid)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Keep the positions for images of ``img_size`` (side, or height and width) from now on."""
        grid = self.grid_of(*_sides(img_size))
        with torch.no_grad():
            table = resize_positions(self.pos_embed, self.grid, grid)
        self.grid, self.pos_embed = grid, nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)

    def drop_class_tokens(self) -> None:
        """Patches alone from now on."""
        self.class_tokens = ClassTokens(0, self.class_tokens.place)
        self.cls_token = self.cls_pos = None

    def adapt_checkpoint(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """``state`` for these tokens: positions of class tokens apart from those of patches, which fit the grid.

        Originals keep both in one table, at the places in the sequence. A network without class tokens takes the
        positions of the patches from a network with them. Square grids of another size are resized.
        """
        state, key = dict(state), f"{prefix}pos_embed"
        if key not in state:
            return state
        table = state[key]
        if f"{prefix}cls_token" in state and f"{prefix}cls_pos" not in state:
            count = state[f"{prefix}cls_token"].numel() // table.shape[2]
            table, state[f"{prefix}cls_pos"] = ClassTokens(count, self.class_tokens.place).split(table)
        if self.class_tokens.count == 0:
            state = {k: t for k, t in state.items() if k not in (f"{prefix}cls_token", f"{prefix}cls_pos")}
        side = math.isqrt(table.shape[1])
        if table.shape[1] != math.prod(self.grid) and side * side == table.shape[1]:
            table = resize_positions(table, (side, side), self.grid)
        return {**state, key: table}


def _sides(img_size: int | Sequence[int]) -> Sequence[int]:
    return (img_size, img_size) if isinstance(img_size, int) else img_size


register_notrace_module(TokenEmbed)


def passes(h: int, w: int, scan: "str | Callable", turn: int) -> Tensor:
    """(1, h * w): the patches in the order of a scan, which may go through them more than once: time ``turn``.

    Raises:
        ValueError: the routes of the scan do not go through the whole map, one after the other.
    """
    order = find_routes(scan)(h, w).flatten()
    order = order[order < h * w]
    turns = order.view(-1, h * w) if order.numel() % (h * w) == 0 else order.new_empty(0, h * w)
    if not len(turns) or (turns.sort(1).values != torch.arange(h * w)).any():
        raise ValueError(
            f"scan {scan!r} is no order of tokens: its routes do not go through the {h} x {w} patches in turn"
        )
    return turns[turn][None]


def order_of(scan: "str | Callable", turn: int) -> Scan | None:
    """The order in which block ``turn`` reads the patches along ``scan``; None where it is that of the image."""
    times = Scan(scan).table(3, 5).inverse.shape[0]
    order = Scan(partial(passes, scan=scan, turn=turn % times))
    return None if order.table(3, 5).routes[0].tolist() == list(range(15)) else order

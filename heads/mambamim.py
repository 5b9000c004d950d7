"""MambaMIM: pre-training of HyMamba by masked volumes (arXiv:2408.08070). Code: FengheTan9/MambaMIM, Apache-2.0.

Cells of 16 x 16 x 16 voxels are hidden from the encoder, whose convolutions see zeros there and whose Mamba blocks do
not see them at all; a decoder rebuilds them. Before it, hidden cells of the coarsest map are filled by state-space
token interpolation (TOKI).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.heads.hymamba import ENCODER_KEYS, ConvEncoder, MambaEncoder
from vmamba.segmentor import check_grid


def interpolate_tokens(x: Tensor, visible: Tensor, A: Tensor) -> Tensor:
    """Tokens for every position from the visible ones (section 3.3): (b, l, c), (b, l) booleans, (c, c) -> (b, l, c).

    Between neighbours a < b among the visible, the first and the last position, with n = b - a and 0 <= j < n:

        z[a + j] = sum over m <= j of A^(n - 1 - m) v[m]       v[m] = (1 - m / (n - 1)) x[a] + m / (n - 1) x[b]

    and z[l - 1] = A x[l - 1]. Values at visible positions are among them; a caller puts the features back there.
    """
    length = x.shape[1]
    here = torch.arange(length, device=x.device)
    anchor = visible | (here == 0) | (here == length - 1)
    before = torch.where(anchor, here, 0).cummax(1).values
    behind = torch.where(anchor, here, length).flip(1).cummin(1).values.flip(1).roll(-1, 1)
    behind[:, -1] = length
    n, step = behind - before, here - before
    share = (step.to(x.dtype) / (n - 1).clamp(min=1))[..., None]

    def at(index: Tensor) -> Tensor:
        return x.gather(1, index.clamp(max=length - 1)[..., None].expand_as(x))

    v = (1 - share) * at(before) + share * at(behind)
    power = n - 1 - step
    power[:, -1] = 1
    terms, moved = torch.where((power == 0)[..., None], v, 0), v
    for exponent in range(1, int(power.max()) + 1):
        moved = moved @ A.mT
        terms = torch.where((power == exponent)[..., None], moved, terms)
    earlier = (before[:, :, None] == before[:, None]) & (here[:, None] >= here)  # (b, l, l), of the same stretch
    return earlier.to(x.dtype) @ terms


def random_cells(batch: int, cells: int, ratio: float, *, device=None, generator=None) -> Tensor:
    """(batch, cells) booleans: in each row round(cells (1 - ratio)) are visible, drawn at random."""
    noise = torch.rand(batch, cells, device=device, generator=generator)
    return noise.argsort(1).argsort(1) < round(cells * (1 - ratio))


def twice(dim: int, out_dim: int, **dd: Any) -> nn.Sequential:
    """Two 3x3x3 convolutions, each with batch norm and ReLU."""
    first = nn.Conv3d(dim, out_dim, 3, padding=1, **dd), nn.BatchNorm3d(out_dim, **dd), nn.ReLU()
    return nn.Sequential(
        *first, nn.Conv3d(out_dim, out_dim, 3, padding=1, **dd), nn.BatchNorm3d(out_dim, **dd), nn.ReLU()
    )


class Rebuilder(nn.Module):
    """Maps from coarse to fine -> the volume (b, out_chans, *grid); each is made twice as fine, with half the channels.

    Args:
        dims: channels of the maps, coarsest first. out_chans: channels of the volume.
    """

    def __init__(self, dims: Sequence[int], out_chans: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose3d(dim, dim, 2, 2, **dd), twice(dim, dim // 2, **dd)) for dim in dims
        )
        self.fuse = nn.ModuleList(twice(2 * dim, dim, **dd) for dim in dims[1:])
        self.proj = nn.Conv3d(dims[-1] // 2, out_chans, 1, **dd)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[(b, c, *grid / s), ...] -> (b, out_chans, *grid)"""
        x = self.up[0](maps[0])
        for up, fuse, y in zip(self.up[1:], self.fuse, maps[1:], strict=True):  # pyright: ignore[reportArgumentType]
            x = up(fuse(torch.cat([x, y], 1)))
        return self.proj(x)


class MambaMIM(nn.Module):
    """Volume (b, in_chans, d, h, w) and its visible cells -> the volume, rebuilt cell by cell in each cell's own scale.

    Args:
        in_chans: channels of the volume.
        dims, depths, ratios, depth, patch: as of :class:`vmamba.heads.hymamba.HyMamba`.
        width: channels of the decoder's coarsest map.
        scrambled: read the interpolated tokens (l, c) as (c, l) without transposing them, a slip of the original code.
        device, dtype: of the parameters.
    """

    axes = 3

    def __init__(
        self,
        *,
        in_chans: int = 1,
        dims: Sequence[int] = (32, 64, 128, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 1),
        ratios: Sequence[int] = (2, 4, 4, 4),
        depth: int = 4,
        patch: "int | Sequence[int]" = 96,
        width: int = 768,
        scrambled: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.scrambled, levels = in_chans, scrambled, len(dims) - 1
        self.cell = 2**levels
        sides = (patch,) * 3 if isinstance(patch, int) else tuple(patch)
        self.encoder = ConvEncoder(in_chans, dims, depths, ratios, **dd)
        self.middle = MambaEncoder(dims[-1], depth, [side // self.cell for side in sides], **dd)
        self.A = nn.Parameter(torch.empty(dims[-1], dims[-1], **dd))
        coarse, widths = dims[:1:-1], [width // 2**i for i in range(levels)]
        self.hidden = nn.Parameter(torch.empty(dims[-1], **dd))  # in place of a hidden token
        self.fill = nn.ParameterList(torch.empty(1, dim, 1, 1, 1, **dd) for dim in coarse)
        self.project = nn.ModuleList([nn.Conv3d(dims[-1], width, 1, **dd)])
        self.project += [nn.Conv3d(dim, out, 3, padding=1, **dd) for dim, out in zip(coarse, widths[1:], strict=True)]
        self.rebuild = Rebuilder(widths, in_chans, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = 0, and truncated normal tokens (0.02)."""
        nn.init.zeros_(self.A)
        for token in (self.hidden, *self.fill):
            nn.init.trunc_normal_(token, std=0.02)

    def encode(self, x: Tensor, visible: Tensor, order: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """(b, in_chans, *grid), (b, cells) -> maps at 1, 1/2, 1/4, 1/8 of it, zero where hidden, and (b, c, *cells)

        The Mamba blocks see the cells ``order``, (b, n), one after the other: the visible ones in raster order, unless
        it is given (the original sorts unstably and sees hidden cells too in a batch). Cells that they do not see have
        the token ``hidden`` in the last map.
        """
        cells = [side // self.cell for side in x.shape[2:]]
        mask = visible.to(x.dtype).unflatten(1, cells)[:, None]

        def keep(y: Tensor) -> Tensor:
            return y * nn.functional.interpolate(mask, size=y.shape[2:])

        skips, y = self.encoder(keep(x), keep)
        tokens = self.middle.placed(y).flatten(1, -2)
        if order is None:
            order = torch.argsort((~visible).long(), dim=1, stable=True)[:, : int(visible.sum(1).max())]
        seen = order[..., None].expand(-1, -1, tokens.shape[2])
        seen_tokens = self.middle.blocks(tokens.gather(1, seen))
        tokens = self.hidden.to(tokens.dtype).expand_as(tokens).scatter(1, seen, seen_tokens)
        return skips, tokens.mT.unflatten(2, cells)

    def interpolate(self, y: Tensor, visible: Tensor) -> Tensor:
        """(b, c, *cells) with interpolated tokens in place of the hidden cells."""
        tokens = interpolate_tokens(y.flatten(2).mT, visible, self.A)
        filled = tokens.reshape(y.shape) if self.scrambled else tokens.mT.reshape(y.shape)
        return torch.where(visible.unflatten(1, y.shape[2:])[:, None], y, filled)

    def forward(self, x: Tensor, visible: Tensor, order: Tensor | None = None) -> Tensor:
        """(b, in_chans, *grid), (b, cells) booleans, in raster order -> (b, in_chans, *grid); see :meth:`encode`."""
        x = check_grid(x, self.in_chans, self.axes, self.cell)
        cells = [side // self.cell for side in x.shape[2:]]
        if visible.shape != (len(x), cells[0] * cells[1] * cells[2]) or visible.dtype != torch.bool:
            wanted = f"booleans ({len(x)}, {cells[0] * cells[1] * cells[2]}), one for each cell of {self.cell} voxels"
            raise ValueError(f"visible must be {wanted}, got {visible.dtype} {tuple(visible.shape)}")
        skips, y = self.encode(x, visible, order)
        mask = visible.to(x.dtype).unflatten(1, cells)[:, None]
        maps = [self.interpolate(y, visible)]
        for token, skip in zip(self.fill, skips[:0:-1], strict=True):
            here = nn.functional.interpolate(mask, size=skip.shape[2:]).bool()
            maps.append(torch.where(here, skip, token.to(skip.dtype)))
        return self.rebuild([project(y) for project, y in zip(self.project, maps, strict=True)])

    def loss(self, x: Tensor, visible: Tensor, order: Tensor | None = None) -> Tensor:
        """The mean squared error over hidden cells, each against its own voxels with mean 0 and variance 1."""
        wanted, rebuilt = self.cut(x), self.cut(self(x, visible, order))
        mean, var = wanted.mean(-1, keepdim=True), wanted.var(-1, keepdim=True)
        error = (rebuilt - (wanted - mean) / (var + 1e-6).sqrt()).square().mean(-1)
        return (error * ~visible).sum() / ((~visible).sum() + 1e-8)

    def cut(self, x: Tensor) -> Tensor:
        """(b, c, *grid) -> (b, cells, voxels): the cells in raster order."""
        size = self.cell
        x = x.unflatten(4, (-1, size)).unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (b, c, f, s, f, s, f, s)
        return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


KEYS = [
    (r"^sparse_encoder\.mae\.mask_token$", "hidden"),
    (r"^sparse_encoder\.", ""),
    *ENCODER_KEYS,
    (r"^A_interpolation$", "A"),
    (r"^(?:mask_tokens\.[04]|densify_projs\.4\.\w+|dense_decoder\.fuse\.0\..*)$", ""),  # never used
    (r"^mask_tokens\.(\d)$", lambda m: f"fill.{int(m[1]) - 1}"),
    (r"^densify_projs\.", "project."),
    (r"^dense_decoder\.dec\.(\d)\.up_sample\.", r"rebuild.up.\1.0."),
    (r"^dense_decoder\.dec\.(\d)\.conv\.", r"rebuild.up.\1.1."),
    (r"^dense_decoder\.fuse\.(\d)\.conv\.", lambda m: f"rebuild.fuse.{int(m[1]) - 1}."),
    (r"^dense_decoder\.proj\.", "rebuild.proj."),
]
MambaMIM.official_keys = KEYS  # pyright: ignore[reportAttributeAccessIssue]

"""MambaMIM: pre-training by masked volumes (arXiv:2408.08070). Code: FengheTan9/MambaMIM, Apache-2.0.

Cells of 16 x 16 x 16 voxels are hidden from the encoder of HyMamba, whose convolutions see zeros there and whose Mamba
blocks do not see them at all; a decoder rebuilds them. Before it, hidden cells of the coarsest map are filled by
state-space token interpolation (TOKI).

The same for every other network here whose encoder gives maps of several sizes: cells are then the pixels of its
coarsest map, and there are as many decoder levels as maps. For HyMamba this is what the published code computes; for
others it is our reading of the method: each route of a scan leaves hidden pixels out, and TOKI goes through the map row
by row.
"""

from collections.abc import Collection, Sequence
from functools import singledispatch
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.heads.hymamba import ENCODER_KEYS, HyMamba, MambaEncoder
from vmamba.heads.lightm_unet import LightMUNet
from vmamba.heads.msvm_unet import MSVMUNet
from vmamba.heads.swin_umamba import SwinUMamba, SwinUMambaD
from vmamba.heads.umamba import ChannelMamba, UMamba
from vmamba.heads.vmunet import VMUNet
from vmamba.segmentor import Segmentor, check_grid, pyramid_maps
from vmamba.unet_blocks import LAYERS
from vmamba.visible import Sight, leak

BATCH_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TOLERANCE = 1e-5  # of what visible places may depend on hidden ones: rounding


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
    return earlier.to(terms.dtype) @ terms


def random_cells(batch: int, cells: int, ratio: float, *, device=None, generator=None) -> Tensor:
    """(batch, cells) booleans: in each row round(cells (1 - ratio)) are visible, drawn at random."""
    noise = torch.rand(batch, cells, device=device, generator=generator)
    return noise.argsort(1).argsort(1) < round(cells * (1 - ratio))


@singledispatch
def encoder_maps(network: nn.Module, x: Tensor) -> list[Tensor]:
    """(b, in_chans, *grid) -> the maps (b, c, *grid / s) that a network's encoder gives its decoder, finest first.

    For a class of your own: ``encoder_maps.register(MyNetwork, function)``. ValueError for networks without.
    """
    known = ", ".join(sorted(cls.__name__ for cls in encoder_maps.registry if cls is not object))
    raise ValueError(f"{type(network).__name__} has no encoder that could be pre-trained; these have: {known}")


@encoder_maps.register
def _(network: HyMamba, x: Tensor) -> list[Tensor]:
    skips, y = network.encoder(x)
    return [*skips, network.middle(y)]


@encoder_maps.register
def _(network: UMamba, x: Tensor) -> list[Tensor]:
    y, maps = network.stem(x), []
    for stage, layer in zip(network.stages, network.mamba, strict=True):
        y = layer(stage(y))
        maps.append(y)
    return maps


@encoder_maps.register
def _(network: LightMUNet, x: Tensor) -> list[Tensor]:
    y, maps = network.stem(x), []
    for level in network.encoder:
        y = level(y)
        maps.append(y)
    return maps


@encoder_maps.register
def _(network: VMUNet, x: Tensor) -> list[Tensor]:
    maps, last = network.encode(x)
    return [y.permute(0, 3, 1, 2) for y in (*maps[:-1], last)]


@encoder_maps.register
def _(network: SwinUMamba, x: Tensor) -> list[Tensor]:
    half = network.stem(x)
    *maps, last = half, *pyramid_maps(network.encoder, half if network.published else x, x.shape[2:])
    return [*(skip(y) for skip, y in zip(network.skips[1:], maps, strict=True)), last]


@encoder_maps.register(MSVMUNet)
@encoder_maps.register(SwinUMambaD)
def _(network: "MSVMUNet | SwinUMambaD", x: Tensor) -> list[Tensor]:
    return pyramid_maps(network.encoder, x, x.shape[2:])


def twice(axes: int, dim: int, out_dim: int, **dd: Any) -> nn.Sequential:
    """Two convolutions of size 3, each with batch norm and ReLU."""
    conv, norm = LAYERS[axes].conv, BATCH_NORMS[axes]
    first = conv(dim, out_dim, 3, padding=1, **dd), norm(out_dim, **dd), nn.ReLU()
    return nn.Sequential(*first, conv(out_dim, out_dim, 3, padding=1, **dd), norm(out_dim, **dd), nn.ReLU())


class Rebuilder(nn.Module):
    """Maps from coarse to fine -> the image (b, out_chans, *grid); each is made finer, with half the channels.

    Args:
        dims: channels of the maps, coarsest first. scales: how much finer the next map is, for each side; the last
            one: the image.
        out_chans: channels of the image.
    """

    def __init__(
        self, dims: Sequence[int], scales: Sequence[tuple[int, ...]], out_chans: int, *, device=None, dtype=None
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        axes = len(scales[0])
        self.up = nn.ModuleList(
            nn.Sequential(LAYERS[axes].up(dim, dim, scale, scale, **dd), twice(axes, dim, dim // 2, **dd))
            for dim, scale in zip(dims, scales, strict=True)
        )
        self.fuse = nn.ModuleList(twice(axes, 2 * dim, dim, **dd) for dim in dims[1:])
        self.proj = LAYERS[axes].conv(dims[-1] // 2, out_chans, 1, **dd)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[(b, c, *grid / s), ...] -> (b, out_chans, *grid)"""
        x = self.up[0](maps[0])
        for up, fuse, y in zip(self.up[1:], self.fuse, maps[1:], strict=True):  # pyright: ignore[reportArgumentType]
            x = up(fuse(torch.cat([x, y], 1)))
        return self.proj(x)


class MambaMIM(nn.Module):
    """Image (b, in_chans, *grid) and its visible cells -> the image, rebuilt cell by cell in each cell's own scale.

    Maps of the image's own size are not used, as published. ``trained`` names the parameters of the network that the
    others depend on: what pre-training trains; the rest of the network is dropped or stays as it is.

    Args:
        network: whose encoder is trained; it is changed.
        width: channels of the decoder's coarsest map; a power of two for each map must divide it.
        scrambled: read the interpolated tokens (l, c) as (c, l) without transposing them, a slip of the original code.
        patch: size of the images, where the network takes no other.

    Raises:
        ValueError: the network has no such encoder, or mixes hidden with visible pixels.
    """

    def __init__(
        self, network: Segmentor, *, width: int = 768, scrambled: bool = False, patch: Sequence[int] | None = None
    ):
        super().__init__()
        self.axes, self.in_chans, self.scrambled = network.axes, network.in_chans, scrambled
        stride = network.stride
        self.cell = (stride,) * self.axes if isinstance(stride, int) else tuple(stride)
        self.sight = Sight(network, self.axes, (ChannelMamba, MambaEncoder))
        fixed = any(isinstance(module, ChannelMamba) for module in network.modules())
        grid = patch if fixed and patch else [2 * side for side in self.cell]
        maps, self.trained = survey(network, self.sight, grid, self.cell)
        drop_untrained(network, self.trained)
        self.network = network
        like = next(network.parameters())
        dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        dims, strides = zip(*((c, s) for c, s in maps[::-1] if prod(s) > 1), strict=True)
        widths, ones = [width // 2**i for i in range(len(dims))], (1,) * self.axes
        if width % 2 ** len(dims):
            raise ValueError(f"width must be a multiple of {2 ** len(dims)} for {len(dims)} maps, got {width}")
        scales = [tuple(a // b for a, b in zip(*pair, strict=True)) for pair in pairwise([*strides, ones])]
        self.A = nn.Parameter(torch.empty(dims[0], dims[0], **dd))
        self.hidden = nn.Parameter(torch.empty(dims[0], **dd))  # in place of a hidden token
        self.fill = nn.ParameterList(torch.empty(1, dim, *ones, **dd) for dim in dims[1:])
        conv = LAYERS[self.axes].conv
        self.project = nn.ModuleList([conv(dims[0], width, 1, **dd)])
        self.project += [conv(dim, out, 3, padding=1, **dd) for dim, out in zip(dims[1:], widths[1:], strict=True)]
        self.rebuild = Rebuilder(widths, scales, self.in_chans, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = 0, and truncated normal tokens (0.02)."""
        nn.init.zeros_(self.A)
        for token in (self.hidden, *self.fill):
            nn.init.trunc_normal_(token, std=0.02)

    def cells(self, grid: Sequence[int]) -> tuple[int, ...]:
        """How many cells an image of this size has along each side."""
        return tuple(side // cell for side, cell in zip(grid, self.cell, strict=True))

    def encode(self, x: Tensor, visible: Tensor, order: Tensor | None = None) -> list[Tensor]:
        """(b, in_chans, *grid), (b, cells) -> the encoder's maps, finest first, zero where hidden.

        In the coarsest map cells that are not read have the token ``hidden``. Scans read the visible cells in their own
        order, unless ``order``, (b, n), says in which cells of the coarsest map are read (the original sorts unstably
        and reads hidden cells too in a batch). Samples with the same visible cells are computed together.
        """
        cells = self.cells(x.shape[2:])
        rows, group = (visible.cpu(), torch.arange(len(x))) if order is not None else _groups(visible.cpu())
        parts: list[list[Tensor]] = []
        for i, row in enumerate(rows):
            which = (group == i).nonzero()[:, 0].to(x.device)
            with self.sight.on(row.view(cells), None if order is None else order[i]):
                maps = encoder_maps(self.network, x if len(rows) == 1 else x[which])
                *finer, last = [y.masked_fill(~self.sight.mask(y.shape[2:], y.device), 0) for y in maps]
                seen = row if order is None else torch.zeros_like(row).index_fill(0, order[i], True)
                last = maps[-1] if order is not None else last
            token = self.hidden.to(last.dtype).view(-1, *(1,) * self.axes)
            parts.append([*finer, torch.where(seen.view(cells).to(last.device), last, token)])
        if len(parts) == 1:
            return parts[0]
        back = group.argsort(stable=True).argsort().to(x.device)
        return [torch.cat(level).index_select(0, back) for level in zip(*parts, strict=True)]

    def interpolate(self, y: Tensor, visible: Tensor) -> Tensor:
        """(b, c, *cells) with interpolated tokens in place of the hidden cells."""
        tokens = interpolate_tokens(y.flatten(2).mT, visible, self.A)
        filled = tokens.reshape(y.shape) if self.scrambled else tokens.mT.reshape(y.shape)
        return torch.where(visible.unflatten(1, y.shape[2:])[:, None], y, filled)

    def forward(self, x: Tensor, visible: Tensor, order: Tensor | None = None) -> Tensor:
        """(b, in_chans, *grid), (b, cells) booleans, in raster order -> (b, in_chans, *grid); see :meth:`encode`."""
        x = check_grid(x, self.in_chans, self.axes, self.cell)
        cells = self.cells(x.shape[2:])
        if visible.shape != (len(x), prod(cells)) or visible.dtype != torch.bool:
            voxels = " x ".join(map(str, self.cell))
            wanted = f"booleans ({len(x)}, {prod(cells)}), one for each cell of {voxels}"
            raise ValueError(f"visible must be {wanted}, got {visible.dtype} {tuple(visible.shape)}")
        *finer, last = self.encode(x, visible, order)
        visible = visible.to(x.device)
        mask = visible.to(x.dtype).unflatten(1, cells)[:, None]
        maps = [self.interpolate(last, visible)]
        for token, skip in zip(self.fill, finer[::-1], strict=False):
            here = nn.functional.interpolate(mask, size=skip.shape[2:]).bool()
            maps.append(torch.where(here, skip, token.to(skip.dtype)))
        return self.rebuild([project(y) for project, y in zip(self.project, maps, strict=True)])

    def loss(self, x: Tensor, visible: Tensor, order: Tensor | None = None) -> Tensor:
        """The mean squared error over hidden cells, each against its own voxels with mean 0 and variance 1."""
        wanted, rebuilt = self.cut(x), self.cut(self(x, visible, order))
        mean, var = wanted.mean(-1, keepdim=True), wanted.var(-1, keepdim=True)
        error = (rebuilt - (wanted - mean) / (var + 1e-6).sqrt()).square().mean(-1)
        hidden = ~visible.to(error.device)
        return (error * hidden).sum() / (hidden.sum() + 1e-8)

    def picture(self, x: Tensor, visible: Tensor) -> Tensor:
        """The image with hidden cells as they are rebuilt, in the mean and the variance of the image's own cells."""
        cells, rebuilt = self.cut(x), self.cut(self(x, visible).to(x.dtype))
        mean, var = cells.mean(-1, keepdim=True), cells.var(-1, keepdim=True)
        rebuilt = rebuilt * (var + 1e-6).sqrt() + mean
        return self.join(torch.where(visible.to(x.device)[..., None], cells, rebuilt), x.shape[2:])

    def cut(self, x: Tensor) -> Tensor:
        """(b, c, *grid) -> (b, cells, voxels): the cells in raster order, channels last in each."""
        for axis in reversed(range(self.axes)):
            x = x.unflatten(2 + axis, (-1, self.cell[axis]))  # (b, c, f, s, f, s, f, s)
        places = range(2, 2 + 2 * self.axes)
        x = x.permute(0, *places[::2], *places[1::2], 1)
        return x.flatten(1 + self.axes).flatten(1, self.axes)

    def join(self, cells: Tensor, grid: Sequence[int]) -> Tensor:
        """(b, cells, voxels) -> (b, c, *grid): back from :meth:`cut`."""
        counts, n = self.cells(grid), self.axes
        x = cells.view(len(cells), *counts, *self.cell, -1)
        pairs = [place for axis in range(n) for place in (1 + axis, 1 + n + axis)]
        return x.permute(0, 2 * n + 1, *pairs).reshape(len(cells), -1, *grid)

    def encoder_state(self) -> dict[str, Tensor]:
        """What pre-training has trained of the network: parameters, and the running statistics of their norms."""
        kept = {}
        for name, tensor in self.network.state_dict().items():
            owner, _, last = name.rpartition(".")
            counted = last in ("running_mean", "running_var", "num_batches_tracked")
            if name in self.trained or (counted and f"{owner}.weight" in self.trained):
                kept[name] = tensor.detach().cpu().clone()
        return kept


def _groups(visible: Tensor) -> tuple[Tensor, Tensor]:
    """(different rows, the number of each sample's row)"""
    return torch.unique(visible, dim=0, return_inverse=True)


def survey(
    network: Segmentor, sight: Sight, grid: Sequence[int], cell: Sequence[int]
) -> tuple[list[tuple[int, tuple[int, ...]]], frozenset[str]]:
    """The encoder's maps, (channels, stride of each side), finest first, and the parameters that they depend on.

    Maps of stride 1 do not count. ValueError if visible places depend on hidden ones.
    """
    training, like = network.training, next(network.parameters())
    network.eval()
    x = torch.randn(2, network.in_chans, *grid, device=like.device, dtype=like.dtype)
    cells = torch.arange(prod(n // c for n, c in zip(grid, cell, strict=True))) % 3 != 1
    cells = cells.view([n // c for n, c in zip(grid, cell, strict=True)])
    try:
        gap = leak(lambda x: encoder_maps(network, x), sight, x, cells)
    except (ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, ValueError) and "pre-trained" in str(error):
            raise
        raise ValueError(f"{type(network).__name__}: cannot leave cells out ({error})") from error
    if gap > TOLERANCE:
        raise ValueError(f"{type(network).__name__}: something in its encoder mixes hidden with visible pixels")
    with sight.on(cells), torch.enable_grad():
        maps = encoder_maps(network, x)
        sizes = [(y.shape[1], tuple(n // side for n, side in zip(grid, y.shape[2:], strict=True))) for y in maps]
        used = [y.sum() for y, (_, stride) in zip(maps, sizes, strict=True) if prod(stride) > 1]
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(used, parameters, allow_unused=True)
    network.train(training)
    return sizes, frozenset(name for name, g in zip(names, gradients, strict=True) if g is not None)


def drop_untrained(network: nn.Module, trained: Collection[str]) -> None:
    """Replace parts without any of these parameters by nothing; single other parameters get no gradients."""
    for name, _ in list(network.named_children()):
        if not any(key.startswith(f"{name}.") for key in trained):
            setattr(network, name, nn.Identity())
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)


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
    (r"^(?=encoder\.|middle\.)", "network."),
]
MambaMIM.official_keys = KEYS  # pyright: ignore[reportAttributeAccessIssue]

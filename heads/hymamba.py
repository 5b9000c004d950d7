"""HyMamba: the network that MambaMIM pre-trains, for volumes (arXiv:2408.08070). Code: FengheTan9/MambaMIM, Apache-2.0.

MedNeXt blocks at four resolutions, Mamba blocks on the coarsest map, UNETR's decoder.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.block import Block
from vmamba.checkpoint import LoadReport, fit, load_checkpoint
from vmamba.registry import register
from vmamba.segmentor import Segmentor
from vmamba.unet_blocks import MAMBA, MAMBA_KEYS, ChannelNorm, ConvResidual, UnetrUp

NORM = partial(ChannelNorm, eps=1e-6)


class MedNeXtBlock(nn.Module):
    """x + a depthwise convolution, a norm and an MLP of hidden width ``ratio`` c: (b, c, *grid) -> (b, c, *grid)."""

    def __init__(self, dim: int, ratio: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv3d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm = NORM(dim, **dd)
        self.conv2 = nn.Conv3d(dim, ratio * dim, 1, **dd)
        self.conv3 = nn.Conv3d(ratio * dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *grid) -> (b, c, *grid)"""
        return x + self.conv3(F.gelu(self.conv2(self.norm(self.conv1(x)))))


class SkipBlock(ConvResidual):
    """A residual block with norms over channels."""

    def __init__(self, dim: int, out_dim: int, **block):
        super().__init__(3, dim, out_dim, norm=NORM, **block)


class ConvEncoder(nn.Module):
    """The convolutions: (b, in_chans, *grid) -> a skip of each resolution and the coarsest map, at 1/16 of it.

    Args:
        in_chans: channels of the image. dims: of the stem and at each resolution.
        depths, ratios: blocks at each resolution but the finest, and the width of their MLPs.
    """

    def __init__(
        self,
        in_chans: int,
        dims: Sequence[int],
        depths: Sequence[int],
        ratios: Sequence[int],
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = nn.Conv3d(in_chans, dims[0], 3, padding=1, **dd)
        self.widen = nn.ModuleList(nn.Conv3d(a, b, 3, padding=1, **dd) for a, b in pairwise(dims))
        self.levels = nn.ModuleList(
            nn.ModuleList(MedNeXtBlock(dim, ratio, **dd) for _ in range(depth))
            for dim, depth, ratio in zip(dims[1:], depths, ratios, strict=True)
        )
        self.skips = nn.ModuleList(SkipBlock(dim, dim, **dd) for dim in dims[1:])

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(b, in_chans, *grid) -> [(b, c, *grid / s), ...], (b, c, *grid / 16)"""
        x, skips = self.stem(x), []
        for widen, level, skip in zip(self.widen, self.levels, self.skips, strict=True):
            x = widen(x)
            skips.append(skip(x))
            x = F.max_pool3d(x, 2)
            for block in cast(nn.ModuleList, level):
                x = block(x)
        return skips, x


def sine_positions(grid: Sequence[int], dim: int) -> Tensor:
    """(1, l, dim), float32: sines and cosines of each coordinate, at dim / (2 sides) frequencies from 1 to 1e-4."""
    count = dim // (2 * len(grid))
    frequency = 10000 ** -(torch.arange(count, dtype=torch.float64) / count)
    angles = [side.flatten()[:, None] * frequency for side in torch.meshgrid(*map(torch.arange, grid), indexing="ij")]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], 1)[None].float()


class MambaEncoder(nn.Module):
    """Positions and blocks of Mamba and MLP on the coarsest map, (b, c, *grid) -> (b, c, *grid).

    The positions are a table of the grid that the network was made for, stored with the weights; for another grid they
    are computed anew.

    Args:
        dim: channels c, a multiple of 6. depth: blocks. grid: of the table.
        scan: the order in which the map is read.
    """

    pos_embed: Tensor

    def __init__(self, dim: int, depth: int, grid: Sequence[int], *, scan: Any = "raster", device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % 6:
            raise ValueError(f"positions in a volume need a multiple of 6 channels, got {dim}")
        self.grid = tuple(grid)
        block = partial(Block, dim, mixer=partial(MAMBA, scan=scan), mlp_ratio=2.0, **dd)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        length = self.grid[0] * self.grid[1] * self.grid[2]
        self.register_buffer("pos_embed", torch.empty(1, length, dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The table of sines and cosines."""
        self.pos_embed.copy_(sine_positions(self.grid, self.pos_embed.shape[-1]))

    def placed(self, x: Tensor) -> Tensor:
        """(b, c, *grid) -> (b, *grid, c), with the positions added."""
        grid = tuple(x.shape[2:])
        table = self.pos_embed if grid == self.grid else sine_positions(grid, x.shape[1])
        return x.movedim(1, -1) + table.to(x).unflatten(1, grid)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *grid) -> (b, c, *grid)"""
        return self.blocks(self.placed(x)).movedim(-1, 1)


register_notrace_module(MambaEncoder)


class HyMamba(Segmentor):
    """Volume (b, in_chans, d, h, w), its sides multiples of 16, -> logits (b, num_classes, d, h, w).

    Args:
        dims: channels of the stem and of the maps at 1, 1/2, 1/4 and 1/8 of the volume; the last also at 1/16.
        depths, ratios: MedNeXt blocks at 1/2, 1/4, 1/8 and 1/16, and the width of their MLPs.
        depth: Mamba blocks.
        patch: size of the volumes, whose positions are stored with the weights.
        scan: the order in which the Mamba blocks read the coarsest map.
        **segmentor: ``num_classes``, ``in_chans``, ``device``, ``dtype`` of :class:`Segmentor`.
    """

    axes = 3

    def __init__(
        self,
        *,
        dims: Sequence[int] = (32, 64, 128, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 1),
        ratios: Sequence[int] = (2, 4, 4, 4),
        depth: int = 4,
        patch: int | Sequence[int] = 96,
        scan: Any = "raster",
        **segmentor,
    ):
        super().__init__(**segmentor)
        dd, levels = self._dd, dims[1:]
        self.stride = 2 ** len(levels)
        sides = (patch,) * 3 if isinstance(patch, int) else tuple(patch)
        self.encoder = ConvEncoder(self.in_chans, dims, depths, ratios, **dd)
        self.middle = MambaEncoder(dims[-1], depth, [side // 2 ** len(levels) for side in sides], scan=scan, **dd)
        rises = zip([levels[-1], *levels[:0:-1]], levels[::-1], strict=True)
        self.decoder = nn.ModuleList(UnetrUp(3, c, out, **dd) for c, out in rises)
        change = nn.Sequential(nn.Conv3d(dims[1], dims[0], 1, **dd), NORM(dims[0], **dd))
        self.last = SkipBlock(dims[1], dims[0], shortcut=change, **dd)
        self.outputs = nn.ModuleList([nn.Conv3d(dims[0], self.num_classes, 1, **dd)])

    def decode(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, *grid) -> [(b, c, *grid)]"""
        skips, y = self.encoder(x)
        y = self.middle(y)
        for up in self.decoder:
            y = up(y, skips.pop())
        return [self.last(y)]


def load_pretrained(model: HyMamba, source: "str | Path | Mapping") -> LoadReport:
    """Start from an encoder that MambaMIM has pre-trained; the decoder keeps its values.

    Args:
        model: the network to fill.
        source: a checkpoint of MambaMIM's encoder or of all of MambaMIM.

    Returns:
        What was loaded; ``missing`` lists what keeps its values.

    Raises:
        FileNotFoundError: no such file; ValueError: tensors of the encoder are missing or have other shapes; nothing
            has been loaded then.
    """
    native, report = fit(source, model)
    free = re.compile(r"decoder\.|last\.|outputs\.|middle\.pos_embed$")  # positions follow from the size
    wrong = [name for name in (*report.missing, *report.misshapen) if not free.match(name)]
    if wrong:
        raise ValueError(f"these are not the weights of a pre-trained HyMamba encoder: {', '.join(wrong[:8])}")
    return load_checkpoint(model, {name: native[name] for name in report.loaded}, strict=False)


VARIANTS = {"hymamba": dict(num_classes=14, in_chans=1, patch=96)}

ENCODER_KEYS = [
    (r"^embeddings\.layer(\d)\.", lambda m: f"encoder.levels.{int(m[1]) - 2}."),
    (r"^embeddings\.expend(\d)\.", lambda m: f"encoder.widen.{int(m[1]) - 1}."),
    (r"^embeddings\.encoder(\d)\.", lambda m: f"encoder.skips.{int(m[1]) - 1}."),
    (r"^embeddings\.stem\.", "encoder.stem."),
    (r"^mae\..*\.mamba\.(?:\w+_b\.\w+|A_b_log|D_b)$", ""),  # of a backward direction that is never computed
    (r"^mae\.blocks\.(\d+)\.mamba\.", r"middle.blocks.\1.mixer."),
    (r"^mae\.(?=blocks\.|pos_embed$)", "middle."),
    *MAMBA_KEYS,
]
KEYS = [
    (r"^sparse_encoder\.", ""),
    (r"^mae\.mask_token$", ""),
    *ENCODER_KEYS,
    (r"^decoder\.decoder([2-5])\.", lambda m: f"decoder.{5 - int(m[1])}."),
    (r"^decoder\.decoder1\.", "last."),
    (r"^decoder\.out\.conv\.", "outputs.0."),
    (r"^last\.conv3\.", "last.shortcut.0."),
    (r"^last\.norm3\.", "last.shortcut.1."),
    (r"\.transp_conv\.conv\.", ".up."),
    (r"\.conv_block\.conv3\.conv\.", ".block.shortcut.0."),
    (r"\.conv_block\.conv([12])\.conv\.", r".block.conv\1."),
]

register(
    HyMamba,
    VARIANTS,
    sides={"hymamba": (96, 96, 96)},
    keys=KEYS,
    paper="2408.08070",
    origin="https://github.com/FengheTan9/MambaMIM",
    license="apache-2.0",
)

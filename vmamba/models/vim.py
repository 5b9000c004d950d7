"""Vision Mamba, Vim (arXiv:2401.09417, ICML 2024). Original code and weights: hustvl/Vim, Apache-2.0.

A plain column of blocks around a bidirectional Mamba mixer, without MLP; the class token stands in the middle.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import apply_rot_embed, build_rotary_pos_embed, calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.columnar import Columnar, ColumnBlock, TokenHead
from vmamba.mixers.bimamba import BiMamba
from vmamba.registry import register
from vmamba.tokens import ClassTokens, Grid, TokenEmbed, middle, order_of


class Vim(Columnar):
    """Patch tokens, positions, a class token, ``depth`` blocks at one stride.

    Args:
        depth: number of blocks.
        dim: channels.
        mixer: builds a block's mixer, ``mixer(dim, device=..., dtype=...)``: (b, h, w, c) -> (b, h, w, c).
        block: builds a block, as :class:`ColumnBlock`.
        embed: builds the tokens, as :class:`TokenEmbed`.
        scan: the order in which patches become a sequence; of a scan with several routes, each block follows the next.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        **columnar: ``img_size``, ``norm``, ``head``, ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``,
            ``device``, ``dtype`` of :class:`Columnar`.
    """

    def __init__(
        self,
        *,
        depth: int,
        dim: int,
        mixer: Callable[..., nn.Module] = BiMamba,
        block: Callable[..., nn.Module] = ColumnBlock,
        embed: Callable[..., TokenEmbed] = TokenEmbed,
        scan: "str | Callable" = "raster",
        drop_path_rate: float = 0.0,
        **columnar,
    ):
        super().__init__(**columnar)
        dd = self._dd
        stem = embed(self.in_chans, dim, img_size=self.img_size, **dd)
        build = partial(block, dim, mixer=mixer, norm=self._norm, class_tokens=stem.class_tokens, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.build(stem, [build(drop_path=rate, order=order_of(scan, i)) for i, rate in enumerate(rates)])


class RotaryBlock(ColumnBlock):
    """A block whose input is turned by its place in the image: rotary positions, of a grid of 14 x 14 at any size.

    As in the original, it is the last tokens that are turned, as many as there are patches: exact without class tokens
    or with all of them first; after any other, patches are turned like their neighbours.

    Args:
        dim: channels c, a multiple of 4.
        residual: turn the residual stream too.
        **block: ``mixer``, ``norm``, ``drop_path`` ... of :class:`ColumnBlock`.
    """

    def __init__(self, dim: int, *, residual: bool = True, **block):
        super().__init__(dim, **block)
        self.residual = residual

    def forward(self, h: Tensor, r: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """(b, l, c), (b, l, c) or None, (rows, columns) -> (b, l, c), (b, l, c)"""
        wide, c = torch.promote_types(h.dtype, torch.float32), h.shape[-1]
        bands = 10000 ** -(torch.arange(c // 4, device=h.device, dtype=wide) * 4 / c)
        sin, cos = build_rotary_pos_embed(list(grid), bands, in_pixels=False, ref_feat_shape=[14, 14], dtype=wide)
        h = _turned(h, sin, cos)
        r = _turned(r, sin, cos) if r is not None and self.residual else r
        return super().forward(h, r, grid)


register_notrace_module(RotaryBlock)


def _turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    before = x.shape[1] - sin.shape[0]
    return torch.cat([x[:, :before], apply_rot_embed(x[:, before:], sin, cos)], 1)


class PairBlock(nn.Module):
    """Two blocks side by side, the second on the reversed sequence; their outputs and residuals are summed.

    Args:
        dim: channels c.
        **block: ``mixer``, ``norm``, ``drop_path`` ... of :class:`ColumnBlock`.
    """

    def __init__(self, dim: int, **block):
        super().__init__()
        self.pair = nn.ModuleList(ColumnBlock(dim, **block) for _ in range(2))

    def forward(self, h: Tensor, r: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """(b, l, c), (b, l, c) or None, (rows, columns) -> (b, l, c), (b, l, c)"""
        there, back = self.pair
        h1, r1 = there(h, r, grid)
        h2, r2 = back(h.flip(1), None if r is None else r.flip(1), grid)
        return h1 + h2.flip(1), r1 + r2.flip(1)


class LargestLogit(TokenHead):
    """The classifier on every token; of each class the largest logit."""

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b, l, c) -> (b, num_classes), or the tokens (b, l, c) with ``pre_logits``."""
        x = self.drop(x)
        return x if pre_logits else self.fc(x).amax(1)


MIDDLE = ClassTokens(1, middle)
STRIDE16: dict[str, Any] = dict(embed=partial(TokenEmbed, class_tokens=MIDDLE), global_pool="token")
STRIDE8: dict[str, Any] = dict(embed=partial(TokenEmbed, class_tokens=MIDDLE, stride=8), global_pool="token")

VARIANTS: dict[str, dict[str, Any]] = {
    "vim_tiny_patch16_224": dict(depth=24, dim=192, drop_path_rate=0.0, **STRIDE16),
    "vim_tiny_patch16_stride8_224": dict(depth=24, dim=192, drop_path_rate=0.0, **STRIDE8),
    "vim_small_patch16_224": dict(depth=24, dim=384, drop_path_rate=0.05, **STRIDE16),
    "vim_small_patch16_stride8_224": dict(depth=24, dim=384, drop_path_rate=0.0, **STRIDE8),
    "vim_base_patch16_224": dict(depth=24, dim=768, drop_path_rate=0.1, **STRIDE16),
}

# official name -> ours, applied in order; of a tuple, the first that gives a name the model has; [i]: part of a tensor
MIXER_KEYS = [
    (r"mixer\.gamma$", "layer_scale.gamma"),
    (r"mixer\.A_b_log$", "mixer.A_log[1]"),
    (r"mixer\.D_b$", "mixer.D[1]"),
    (r"mixer\.(A_log|D)$", r"mixer.\1[0]"),
    (r"mixer\.conv1d_b\.(\w+)$", r"mixer.conv1d.\1[1]"),
    (r"mixer\.conv1d\.(weight|bias)$", (r"mixer.conv1d.\1[0]", r"mixer.conv.\1[0]")),
    (r"mixer\.(x_proj|dt_proj)_b\.weight$", r"mixer.\1[1]"),
    (r"mixer\.(x_proj|dt_proj)\.weight$", r"mixer.\1[0]"),
    (r"mixer\.dt_proj_b\.bias$", "mixer.dt_bias[1]"),
    (r"mixer\.dt_proj\.bias$", "mixer.dt_bias[0]"),
]
KEYS = [
    (r"^rope\.freqs_(cos|sin)$", ""),
    (r"^patch_embed\.", "stem."),
    (r"^cls_token_head$", "stem.cls_token[0]"),
    (r"^cls_token_tail$", "stem.cls_token[1]"),
    (r"^(?=cls_token$|pos_embed$)", "stem."),
    (r"^layers\.(\d+)\.", (r"blocks.\1.", lambda m: f"blocks.{int(m[1]) // 2}.pair.{int(m[1]) % 2}.")),
    *MIXER_KEYS,
    (r"^norm_f\.", "norm."),
    (r"^head\.(?=weight$|bias$)", "head.fc."),
]

register(
    Vim,
    VARIANTS,
    keys=KEYS,
    paper="2401.09417",
    origin="https://github.com/hustvl/Vim",
    license="apache-2.0",
    timm=dict(first_conv="stem.proj", classifier="head.fc", pool_size=None),
)

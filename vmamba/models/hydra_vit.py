"""Hydra-ViT: a vision transformer whose attention is replaced by the Hydra mixer (arXiv:2407.09941).

The architecture is ours. The paper reports an ImageNet experiment of this kind (ViT-Base, 81.0), but neither code nor
weights of it are public, so nothing here is meant to reproduce it. An MLP ratio of 3 instead of 4 makes up for the
mixer, which has about 6 c^2 parameters where attention has 4 c^2.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from timm.layers import Mlp, calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.block import init_linear
from vmamba.columnar import Columnar, ColumnBlock
from vmamba.mixers.hydra import Hydra
from vmamba.norm import LayerNorm
from vmamba.registry import register
from vmamba.tokens import ClassTokens, Grid, TokenEmbed, order_of


@register_notrace_module
class MlpBlock(ColumnBlock):
    """r <- r + h, r <- r + mixer(norm(r)), h <- mlp(norm2(r)): the block of a vision transformer.

    Args:
        dim: channels c.
        mlp_ratio: hidden width of the MLP over c.
        norm: builds the norms, ``norm(dim, device=..., dtype=...)``.
        **block: ``mixer``, ``drop_path``, ``order``, ``device``, ``dtype`` ... of :class:`ColumnBlock`.
    """

    def __init__(self, dim: int, *, mlp_ratio: float = 4.0, norm: Callable[..., nn.Module] = LayerNorm, **block):
        super().__init__(dim, norm=norm, **block)
        dd: dict[str, Any] = {"device": block.get("device"), "dtype": block.get("dtype")}
        self.norm2 = norm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, h: Tensor, r: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """(b, l, c), (b, l, c) or None, (rows, columns) -> (b, l, c), (b, l, c)"""
        mixed, stream = super().forward(h, r, grid)
        stream = stream + mixed
        x = self.norm2(stream.to(cast(Tensor, self.norm2.weight).dtype))
        return cast(nn.Module, self.drop_path)(self.mlp(x)), stream


PATCHES = partial(TokenEmbed, class_tokens=ClassTokens(0))


class HydraViT(Columnar):
    """Patch tokens with positions, ``depth`` blocks of mixer and MLP, the mean of the tokens; no class token.

    Args:
        depth: number of blocks.
        dim: channels.
        mixer: builds a block's mixer, ``mixer(dim, device=..., dtype=...)``: (b, h, w, c) -> (b, h, w, c).
        mlp_ratio: hidden width of the MLPs over their channels.
        embed: builds the tokens, as :class:`TokenEmbed`.
        scan: the order in which patches become a sequence; of a scan with several routes, each block follows the next:
            ``cross`` makes blocks read rows and columns by turns.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        **columnar: ``img_size``, ``norm``, ``head``, ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``,
            ``device``, ``dtype`` of :class:`Columnar`.
    """

    def __init__(
        self,
        *,
        depth: int,
        dim: int,
        mixer: Callable[..., nn.Module] = Hydra,
        mlp_ratio: float = 3.0,
        embed: Callable[..., TokenEmbed] = PATCHES,
        scan: "str | Callable" = "raster",
        drop_path_rate: float = 0.0,
        **columnar,
    ):
        super().__init__(**{"norm": LayerNorm, **columnar})
        dd = self._dd
        stem = embed(self.in_chans, dim, img_size=self.img_size, **dd)
        build = partial(MlpBlock, dim, mixer=mixer, mlp_ratio=mlp_ratio, norm=self._norm, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        orders = [order_of(scan, i) for i in range(depth)]
        blocks = [
            build(drop_path=rate, order=order, class_tokens=stem.class_tokens)
            for rate, order in zip(rates, orders, strict=True)
        ]
        self.build(stem, blocks)

    def initialise(self) -> None:
        """Truncated normal (0.02) for linear layers, as in vision transformers."""
        self.apply(init_linear)


VARIANTS: dict[str, dict[str, Any]] = {
    "hydra_vit_tiny_patch16_224": dict(depth=12, dim=192, drop_path_rate=0.0),
    "hydra_vit_small_patch16_224": dict(depth=12, dim=384, drop_path_rate=0.1),
    "hydra_vit_base_patch16_224": dict(depth=12, dim=768, drop_path_rate=0.2),
}

register(
    HydraViT,
    VARIANTS,
    keys=(),
    paper="2407.09941",
    origin="https://github.com/goombalab/hydra",
    license="mit",
    timm=dict(first_conv="stem.proj", classifier="head.fc", pool_size=None),
)

"""ShuffleMamba for dense prediction (arXiv:2408.17081): the backbones of UPerNet and Mask R-CNN.

Original code: huangzizheng01/ShuffleMamba, no licence stated (its deformable attention: Apache-2.0). A plain column
without class token, and the same column in a ViT-Adapter (arXiv:2205.08534).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from vmamba.column_pyramid import ColumnPyramid, Neck, States, hidden, stream
from vmamba.models.shufflemamba import KEYS, ShuffleMamba
from vmamba.norm import LayerNorm
from vmamba.registry import register
from vmamba.tokens import NO_CLASS_TOKENS, TokenEmbed
from vmamba.vit_adapter import ViTAdapter


def hidden_then_stream(states: States, index: int) -> Tensor:
    """A block's own output h, (b, l, c); of the last block the stream h + r."""
    return (stream if index + 1 == len(states) else hidden)(states, index)


class LastNormed(Neck):
    """All maps at the stride of the column, the last one through a norm over its channels.

    Args:
        channels: of each map. stride: of all maps.
        norm: builds the norm, ``norm(channels, device=..., dtype=...)``.
    """

    official_keys = ((r"^norm_f\.", "neck.norm."),)

    def __init__(
        self,
        channels: Sequence[int],
        stride: int,
        *,
        norm: Callable[..., nn.Module] = LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.channels, self.strides = tuple(channels), (stride,) * len(channels)
        self.norm = norm(channels[-1], device=device, dtype=dtype)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[(b, c, h, w), ...] -> [(b, c, h, w), ...]"""
        return [*maps[:-1], self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]


class ShuffleMambaDense(ColumnPyramid):
    """(b, in_chans, h, w) -> maps (b, c, h / 16, w / 16): what blocks add to the stream; of the last, the stream.

    ``norm`` should be that of the classifier whose weights are the start. The original takes LayerNorm whatever that
    was: weights of RMSNorm load, but then the mean is taken off too.

    Args:
        out_indices, tap, neck: what is made of the blocks' results; see :class:`ColumnPyramid`.
        **shuffled: settings of :class:`ShuffleMamba`.
    """

    def __init__(
        self,
        *,
        out_indices: Sequence[int] | None = None,
        tap: Callable = hidden_then_stream,
        neck: Callable | None = None,
        **shuffled,
    ):
        settings = {"num_classes": 0, "norm": LayerNorm, "embed": PATCHES, **shuffled}
        neck = partial(LastNormed, norm=settings["norm"]) if neck is None else neck
        super().__init__(ShuffleMamba(**settings), out_indices=out_indices, tap=tap, neck=neck)


class ShuffleMambaAdapter(ViTAdapter):
    """(b, in_chans, h, w) -> maps (b, c, h / s, w / s) at strides 4, 8, 16, 32.

    Args:
        heads, points, ratio, width, ffn_ratio: see :class:`ViTAdapter`.
        drop_path_rate: stochastic depth of the last block and of the extractors.
        **shuffled: settings of :class:`ShuffleMamba`.
    """

    def __init__(
        self,
        *,
        heads: int = 12,
        points: int = 4,
        ratio: float = 0.5,
        width: int = 64,
        ffn_ratio: float = 0.25,
        drop_path_rate: float = 0.0,
        **shuffled,
    ):
        settings = {"num_classes": 0, "norm": LayerNorm, "embed": PATCHES, "drop_path_rate": drop_path_rate, **shuffled}
        super().__init__(
            ShuffleMamba(**settings),
            heads=heads,
            points=points,
            ratio=ratio,
            width=width,
            ffn_ratio=ffn_ratio,
            drop_path=drop_path_rate,
        )


PATCHES = partial(TokenEmbed, class_tokens=NO_CLASS_TOKENS)

VARIANTS: dict[str, dict[str, Any]] = {
    "shufflemamba_seg_tiny": dict(depth=24, dim=192, drop_path_rate=0.2),
    "shufflemamba_seg_base": dict(depth=24, dim=768, drop_path_rate=0.2),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "shufflemamba_adapter_middle": dict(depth=32, dim=576, drop_path_rate=0.2),
    "shufflemamba_adapter_base": dict(depth=24, dim=768, drop_path_rate=0.2),
    "shufflemamba_adapter_large": dict(depth=48, dim=1024, heads=16, drop_path_rate=0.2),
}

ABOUT: dict[str, Any] = dict(
    keys=KEYS,
    paper="2408.17081",
    origin="https://github.com/huangzizheng01/ShuffleMamba",
    license="none stated",
)
register(ShuffleMambaDense, VARIANTS, **ABOUT)
register(ShuffleMambaAdapter, ADAPTERS, **ABOUT)

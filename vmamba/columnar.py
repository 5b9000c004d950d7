"""Columnar: one grid of patches from the first block to the last, as in ViT; timm's protocol is TimmModel's.

Blocks hand on a pair (h, r): the last block's output, and the residual stream before it, in float32 or wider (Vim).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerScale, SelectAdaptivePool2d, to_2tuple
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn

from vmamba.add_norm import add_then_norm
from vmamba.block import init_linear
from vmamba.narrow import Layer, narrow_together
from vmamba.protocol import TimmModel
from vmamba.scans import Scan
from vmamba.tokens import NO_CLASS_TOKENS, ClassTokens, Grid, TokenEmbed

RMSNorm = partial(nn.RMSNorm, eps=1e-5)
Mixers = Mapping[nn.Module, Layer]  # how the mixers of some blocks are called
State = tuple[Tensor, Tensor | None, Grid, Mixers]  # h (b, l, c), r (b, l, c) or None before the first block, grid


class ColumnBlock(nn.Module):
    """r <- r + h, h <- mixer(norm(r)); the first block takes h for r.

    Args:
        dim: channels c.
        mixer: builds the token mixer, ``mixer(dim, device=..., dtype=...)``: (b, h, w, c) -> (b, h, w, c). It sees the
            grid of the patches; with class tokens, which have no place on it, or in another order one row of tokens.
        norm: builds the norm, ``norm(dim, device=..., dtype=...)``.
        drop_path: probability of dropping the output for a sample.
        layer_scale: initial factor of the output, one for each channel; None for no factor.
        order: the order in which the mixer sees the patches; that of the image by default.
        class_tokens: the class tokens among them, which keep their places when ``order`` moves the patches.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable[..., nn.Module],
        norm: Callable[..., nn.Module] = RMSNorm,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        order: Scan | None = None,
        class_tokens: ClassTokens = NO_CLASS_TOKENS,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = norm(dim, **dd)
        self.mixer = mixer(dim, **dd)
        self.layer_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.order, self.class_tokens = order, class_tokens

    def forward(self, h: Tensor, r: Tensor | None, grid: Grid, mixer: Layer | None = None) -> tuple[Tensor, Tensor]:
        """(b, l, c), (b, l, c) or None, (rows, columns) -> (b, l, c), (b, l, c); ``mixer`` calls the block's own."""
        x, r = add_then_norm(h, r, self.norm)
        return self.drop_path(self.layer_scale(self.mix(x, grid, self.mixer if mixer is None else mixer))), r

    def mix(self, x: Tensor, grid: Grid, mixer: Layer) -> Tensor:
        """(b, l, c) -> (b, l, c) through the mixer."""
        shape = grid if math.prod(grid) == x.shape[1] else (1, x.shape[1])
        if self.order is None:
            return mixer(x.unflatten(1, shape)).flatten(1, 2)
        patches, tokens = self.class_tokens.split(x)
        patches = self.order.split(patches.unflatten(1, grid))[:, 0]
        y = mixer(self.class_tokens.insert(patches, tokens)[:, None])[:, 0]
        patches, tokens = self.class_tokens.split(y)
        patches = self.order.merge(patches[:, None], *grid).flatten(1, 2)
        return self.class_tokens.insert(patches, tokens)


register_notrace_module(ColumnBlock)


class TokenPool(nn.Module):
    """(b, l, c) -> (b, c): ``token`` the mean of the class tokens, ``last`` the last token, else timm's of the patches.

    An empty string leaves the tokens as they are.

    Args:
        pool_type: the name.
        channels: c. device, dtype: of parameters. These three are for pools that have parameters; this one has none.
        class_tokens: the class tokens among the tokens.

    Raises:
        ValueError: ``token`` without class tokens; AssertionError: the name is unknown.
    """

    def __init__(self, pool_type: str, channels: int, *, class_tokens: ClassTokens, device=None, dtype=None):
        super().__init__()
        if pool_type == "token" and not class_tokens.count:
            raise ValueError("global_pool='token' needs class tokens; without them take 'avg', 'max', 'last' or ''")
        self.pool_type, self.class_tokens = pool_type, class_tokens
        self.pool = None if pool_type in TOKEN_POOLS else SelectAdaptivePool2d(1, pool_type, True, "NHWC")

    def feat_mult(self) -> int:
        """Channels of the result over c."""
        return 1 if self.pool is None else self.pool.feat_mult()

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, c) -> (b, c)"""
        if self.pool is None:
            return TOKEN_POOLS[self.pool_type](x, self.class_tokens)
        return self.pool(self.class_tokens.patches(x)[:, None])


TOKEN_POOLS: dict[str, Callable[[Tensor, ClassTokens], Tensor]] = {
    "": lambda x, class_tokens: x,
    "last": lambda x, class_tokens: x[:, -1],
    "token": lambda x, class_tokens: class_tokens.tokens(x).mean(1),
}


class TokenHead(nn.Module):
    """Tokens (b, l, c) -> logits: pooling, dropout, linear layer; used as timm's ``ClassifierHead``.

    Args:
        in_features: channels c. num_classes: width of the classifier; 0 for pooled features.
        pool_type: see :class:`TokenPool`.
        drop_rate: dropout before the classifier.
        class_tokens: the class tokens among the tokens.
        pool: builds the pooling, as :class:`TokenPool`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        class_tokens: ClassTokens = NO_CLASS_TOKENS,
        pool: Callable[..., TokenPool] = TokenPool,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features, self.class_tokens, self._pool = in_features, class_tokens, pool
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def reset(self, num_classes: int, pool_type: str | None = None, *, device=None, dtype=None) -> None:
        """A new classifier of ``num_classes`` (0: none), pooling as before unless ``pool_type`` is given."""
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if pool_type is not None:
            pool = self._pool(pool_type, self.in_features, class_tokens=self.class_tokens, **dd)
            self.global_pool = pool.train(self.training)
        self.num_features = self.in_features * self.global_pool.feat_mult()
        linear = nn.Linear(self.num_features, num_classes, **dd) if num_classes else nn.Identity()
        self.fc = linear.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b, l, c) -> (b, num_classes), or the pooled features (b, c) with ``pre_logits``."""
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)


register_notrace_module(TokenHead)


class Columnar(TimmModel):
    """Image (b, in_chans, h, w) -> logits, or the map after each block, all at one stride.

    A model calls :meth:`build` once with its stem and blocks, made with ``img_size`` and ``norm``.

    Args:
        img_size: side of the image, or (height, width), for which positions are learned; others do too.
        norm: builds norms, ``norm(dim, device=..., dtype=...)``.
        head: builds pooling and classifier, as :class:`TokenHead`.
        **model: ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``, ``device``, ``dtype`` of
            :class:`TimmModel`; ``global_pool`` may also be ``token`` (mean of the class tokens) or ``last``.
    """

    output_fmt = "NLC"
    level_name = "blocks"
    grad_checkpointing = False
    stem: TokenEmbed
    img_size: int | Sequence[int]

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        norm: Callable[..., nn.Module] = RMSNorm,
        head: Callable[..., Any] = TokenHead,
        **model,
    ):
        super().__init__(**model)
        self.img_size, self._norm, self._head = img_size, norm, head

    def build(self, stem: TokenEmbed, blocks: Sequence[nn.Module]) -> None:
        """Take the stem and the blocks, (h, r, grid) -> (h, r) each; add norm and head; initialise."""
        self.num_features = dim = stem.proj.out_channels
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        head = self._head(dim, self.num_classes, class_tokens=stem.class_tokens, **self._head_options, **self._dd)
        every = len(blocks)
        self.complete(
            channels=[dim] * every, strides=[stem.stride] * every, norm=self._norm(dim, **self._dd), head=head
        )

    @classmethod
    def feature_levels(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        """The last block of each quarter."""
        return quarters(settings["depth"])

    def initialise(self) -> None:
        """The classifier as everywhere; every ``out_proj`` Kaiming uniform, over the root of the depth (Vim)."""
        self.head.apply(init_linear)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("out_proj.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter /= math.sqrt(len(self.blocks))

    @property
    def least_side(self) -> int:
        """Pixels that height and width of an image must have at least: those of a patch."""
        return self.stem.patch

    def begin(self, x: Tensor) -> State:
        """(b, in_chans, h, w) -> tokens, no residual yet, grid, what :meth:`mixers` gives."""
        h, grid = self.stem(x)
        return h, None, grid, self.mixers(h)

    def mixers(self, x: Tensor) -> Mixers:
        """How to call blocks' mixers in this forward pass, for tokens like x: the weights of all are cast together.

        With gradients each mixer casts its own: gradients would have to wait for those of all others. So does each in
        compiled code, which takes twice as long to compile where one operator casts for the whole column.
        """
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            return {}
        blocks = [block for block in self.blocks if type(block) is ColumnBlock]
        calls = narrow_together(x, [block.mixer for block in blocks])
        return {block: calls[block.mixer] for block in blocks if block.mixer in calls}

    def advance(self, level: nn.Module, state: State) -> State:
        """The state after a block."""
        h, r, grid, mixers = state
        options = {"mixer": mixers[level]} if level in mixers else {}
        pair = checkpoint(level, h, r, grid) if self.grad_checkpointing else level(h, r, grid, **options)
        h, r = cast(tuple[Tensor, Tensor], pair)
        return h, r, grid, mixers

    def end(self, state: State, norm: bool = True) -> Tensor:
        """The stream h + r, (b, l, c), normalised."""
        h, r, *_ = state
        if norm and r is not None and hasattr(self.norm, "weight"):  # pruned networks may have none
            return add_then_norm(h, r, self.norm, wide=True)[0]
        stream = (h if r is None else r + h).to(self.stem.proj.weight.dtype)
        return self.norm(stream) if norm else stream

    def tap(self, state: State, index: int, norm: bool) -> Tensor:
        """The patches of the stream after a block, (b, h, w, c)."""
        return self.stem.to_map(self.end(state, norm), state[2])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Store the positions for images of ``img_size``; images of other sizes still do, with resized positions."""
        self.img_size = img_size
        self.stem.set_input_size(img_size)
        size = {"img_size": to_2tuple(img_size)}
        self._traits = {**getattr(self, "_traits", {}), **size}  # what timm reports, and rebuilds a model from
        self._model_args = {**getattr(self, "_model_args", {}), **size}

    def drop_class_tokens(self) -> None:
        """Patches alone from now on; what pools class tokens has nothing left to pool."""
        self.stem.drop_class_tokens()
        for module in self.modules():
            if isinstance(module, ColumnBlock | TokenHead | TokenPool):
                module.class_tokens = self.stem.class_tokens

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


def quarters(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of ``depth`` blocks.

    >>> quarters(24)
    (5, 11, 17, 23)
    """
    return tuple(sorted({(i + 1) * depth // 4 - 1 for i in range(4)} - {-1}))

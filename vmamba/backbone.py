"""Backbone: a stem and stages on channels-last maps; timm's model protocol comes from :class:`TimmModel`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from timm.layers import ClassifierHead
from timm.models import checkpoint_seq
from torch import Tensor, nn

from vmamba.block import run_blocks
from vmamba.norm import LayerNorm
from vmamba.protocol import TimmModel


class Stage(nn.Module):
    """Downsampling (or nothing), then blocks: (b, h, w, c) -> (b, h', w', c')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h', w', c')"""
        return self.run(self.downsample(x))

    def run(self, x: Tensor) -> Tensor:
        """All blocks, one after the other: (b, h, w, c) -> (b, h, w, c)"""
        return cast(Tensor, checkpoint_seq(self.blocks, x)) if self.grad_checkpointing else run_blocks(self.blocks, x)


class Backbone(TimmModel):
    """Image (b, in_chans, h, w) -> logits (b, num_classes), or feature maps at several strides.

    A model calls :meth:`build` once with its stem and stages; the arguments are those of :class:`TimmModel`. Where it
    feeds a detector or segmentor, each map goes through an ``output_norm`` of its own; ``nn.Identity`` for none.
    """

    output_norm: Callable[..., nn.Module] = partial(LayerNorm, wide=True)

    def build(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        norm: nn.Module | None = None,
        head: Callable[..., Any] = ClassifierHead,
        num_features: int | None = None,
    ) -> None:
        """Take the stem and the stages, whose outputs have ``channels`` at ``strides``; add norm, head; initialise.

        What lies between the last stage and the pooling is ``norm``, with ``num_features`` channels after it: LayerNorm
        over the channels of the last stage by default. ``head`` builds pooling and classifier with the arguments of
        timm's ``ClassifierHead``.
        """
        self.num_features = num_features or channels[-1]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        norm = LayerNorm(self.num_features, wide=True, **self._dd) if norm is None else norm
        options = {"input_fmt": self.output_fmt, **self._head_options, **self._dd}
        head = head(self.num_features, self.num_classes, **options)
        self.complete(channels=channels, strides=strides, norm=norm, head=head)

    def begin(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> the stem's map, (b, h / s, w / s, c)."""
        return self.stem(x)

    def advance(self, level: nn.Module, state: Tensor) -> Tensor:
        """The map after a stage."""
        return level(state)

    def tap(self, state: Tensor, index: int, norm: bool) -> Tensor:
        """The map itself; the final norm fits the last stage alone."""
        return self.norm(state) if norm and index == len(self.stages) - 1 else state

    def end(self, state: Tensor, norm: bool = True) -> Tensor:
        """The last map, normalised."""
        return self.norm(state) if norm else state

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute the blocks of each stage in the backward pass."""
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        downsample, block = r"^stages\.(\d+)\.downsample", r"^stages\.(\d+)\.blocks\.(\d+)"
        return {"stem": r"^stem", "blocks": [(downsample, (0,)), (block, None), (r"^norm", (99999,))]}

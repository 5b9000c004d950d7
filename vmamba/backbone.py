"""Backbone: a stem and stages on channels-last maps, with all of timm's model protocol, written once for the zoo."""

from collections.abc import Sequence
from typing import Any, cast

from timm.layers import ClassifierHead, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vmamba.block import init_linear
from vmamba.norm import LayerNorm


class Stage(nn.Module):
    """Downsampling (or nothing), then blocks: (b, h, w, c) -> (b, h', w', c')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h', w', c')"""
        x = self.downsample(x)
        return cast(Tensor, checkpoint_seq(self.blocks, x)) if self.grad_checkpointing else self.blocks(x)


class Backbone(nn.Module):
    """Image (b, in_chans, h, w) -> logits (b, num_classes), or feature maps at several strides.

    A model calls :meth:`build` once with its stem and stages.

    Args:
        num_classes: width of the classifier; 0 for pooled features.
        in_chans: channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax`` or an empty string for maps.
        drop_rate: dropout before the classifier.
        device, dtype: where and in which type the parameters are made.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self._head_options: dict[str, Any] = {"pool_type": global_pool, "drop_rate": drop_rate}
        self._dd: dict[str, Any] = {"device": device, "dtype": dtype}

    def build(
        self, stem: nn.Module, stages: Sequence[Stage], *, channels: Sequence[int], strides: Sequence[int]
    ) -> None:
        """Take the stem and the stages, whose outputs have ``channels`` at ``strides``; add norm, head; initialise."""
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.feature_info = [
            {"num_chs": c, "reduction": s, "module": f"stages.{i}"}
            for i, (c, s) in enumerate(zip(channels, strides, strict=True))
        ]
        self.num_features = self.channels[-1]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm(self.num_features, wide=True, **self._dd)
        self.head = ClassifierHead(
            self.num_features, self.num_classes, input_fmt=self.output_fmt, **self._head_options, **self._dd
        )
        self.init_weights()

    def init_weights(self, needs_reset: bool = False) -> None:
        """Truncated normal (0.02) for linear layers; with ``needs_reset`` every other module starts afresh too."""
        for module in self.modules():
            if needs_reset and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            init_linear(module)

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> normalised last map (b, h / s, w / s, c)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b, h, w, c) -> logits (b, num_classes), or the pooled features (b, c) with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, num_classes)"""
        return self.forward_head(self.forward_features(x))

    def features(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) -> the map after each stage, (b, h / s, w / s, c), before the final norm."""
        return cast(list[Tensor], self.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after the stages ``indices`` (all of them by default), and the final map of ``forward_features``.

        Args:
            x: (b, in_chans, h, w).
            indices: the last n stages if an int, all if None, else those listed.
            norm: apply the final norm to the last stage's map.
            stop_early: stop after the last stage asked for; the final norm is then skipped.
            output_fmt: ``NCHW`` or ``NHWC`` for the intermediate maps.
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), _listed(indices))
        stages = list(self.stages)[: last + 1 if stop_early else None]
        x = self.stem(x)
        maps = []
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in take:
                maps.append(self.norm(x) if norm and index == len(self.stages) - 1 else x)
        if output_fmt == "NCHW":
            maps = [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        if intermediates_only:
            return maps
        return (self.norm(x) if len(stages) == len(self.stages) else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages ``indices`` do not need; returns them as absolute numbers."""
        take, last = feature_take_indices(len(self.stages), _listed(indices))
        shortened = last < len(self.stages) - 1
        del self.stages[last + 1 :]
        self.num_features = self.channels[last]
        if prune_norm or shortened:
            self.norm = nn.Identity().train(self.training)
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    @property
    def head_hidden_size(self) -> int:
        """Channels of the pooled features that the classifier takes."""
        return self.head.num_features

    def get_classifier(self) -> nn.Module:
        """The linear layer before the logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of ``num_classes`` (0: none), pooling as before unless ``global_pool`` is given."""
        self.num_classes = num_classes
        self.head.in_features = self.num_features
        dd: dict[str, Any] = get_device_dtype(self)
        self.head.reset(num_classes, global_pool, **dd)

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

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay would harm: state matrices, skips, step-size biases."""
        kept = ("A_log", "D", "dt_bias")
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in kept}

    def __prepare_scriptable__(self):
        raise NotImplementedError("TorchScript cannot compile the scans; use torch.compile or torch.export instead")


def _listed(indices: int | Sequence[int] | None) -> int | list[int] | None:
    return list(indices) if isinstance(indices, Sequence) else indices

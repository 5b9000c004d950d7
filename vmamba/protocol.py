"""TimmModel: what timm expects of an image model, written once for pyramids of stages and for columns of blocks."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from timm.layers import get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vmamba.block import init_linear, reset_parameters
from vmamba.images import check_image

SPARED = ("A_log", "D", "dt_bias", "pos_embed", "cls_token", "cls_pos")  # leaf names that weight decay leaves alone


class TimmModel(nn.Module):
    """Image (b, in_chans, h, w) -> logits (b, num_classes), or feature maps after each level: a stage or a block.

    A kind of network has a ``stem``, its levels under the name ``level_name``, and defines four methods: :meth:`begin`,
    :meth:`advance`, :meth:`tap` and :meth:`end`. What goes from level to level is its own affair (a state).

    Args:
        num_classes: width of the classifier; 0 for pooled features.
        in_chans: channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax`` or an empty string for no pooling.
        drop_rate: dropout before the classifier.
        device, dtype: where and in which type the parameters are made.
    """

    output_fmt = "NHWC"
    level_name = "stages"
    stem: Any

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

    def complete(self, *, channels: Sequence[int], strides: Sequence[int], norm: nn.Module, head: Any) -> None:
        """Take what follows the levels, whose maps have ``channels`` at ``strides``; initialise."""
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.feature_info = [
            {"num_chs": c, "reduction": s, "module": f"{self.level_name}.{i}"}
            for i, (c, s) in enumerate(zip(channels, strides, strict=True))
        ]
        self.norm, self.head = norm, head
        self.init_weights()

    @classmethod
    def feature_levels(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        """The levels whose maps timm's ``features_only`` gives by default, for a network of these settings."""
        return tuple(range(len(settings["depths"])))

    @property
    def levels(self) -> Any:
        """The stages or blocks, in order."""
        return getattr(self, self.level_name)

    @property
    def least_side(self) -> int:
        """Pixels that height and width of an image must have at least: those of one step of the stem."""
        return self.strides[0]

    def begin(self, x: Tensor) -> Any:
        """(b, in_chans, h, w) -> the state before the first level."""
        raise NotImplementedError

    def advance(self, level: nn.Module, state: Any) -> Any:
        """The state after ``level``."""
        raise NotImplementedError

    def tap(self, state: Any, index: int, norm: bool) -> Tensor:
        """The map (b, h / s, w / s, c) of the state after level ``index``, through the final norm if ``norm``."""
        raise NotImplementedError

    def end(self, state: Any, norm: bool = True) -> Tensor:
        """What ``forward_features`` returns of the last state."""
        raise NotImplementedError

    def init_weights(self, needs_reset: bool = False) -> None:
        """Truncated normal (0.02) for linear layers; with ``needs_reset`` every other module starts afresh too."""
        if needs_reset:
            reset_parameters(self)
        self.initialise()

    def initialise(self) -> None:
        """What differs from the modules' own initialisation."""
        self.apply(init_linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> normalised result of the last level."""
        state = self.begin(check_image(x, self.in_chans, self.least_side))
        for level in self.levels:
            state = self.advance(level, state)
        return self.end(state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The result of ``forward_features`` -> logits (b, num_classes); with ``pre_logits`` pooled features (b, c)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, num_classes)"""
        return self.forward_head(self.forward_features(x))

    def features(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) -> the map after each level, (b, h / s, w / s, c), before the final norm."""
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
        """The maps after the levels ``indices`` (all of them by default), and the result of ``forward_features``.

        Args:
            x: (b, in_chans, h, w).
            indices: the last n levels if an int, all if None, else those listed.
            norm: apply the final norm to the maps that it fits: of a pyramid the last, of a column every one.
            stop_early: stop after the last level asked for; the result then is without the final norm.
            output_fmt: ``NCHW`` or ``NHWC`` for the intermediate maps.
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.levels), _listed(indices))
        levels = list(self.levels)[: last + 1 if stop_early else None]
        state = self.begin(check_image(x, self.in_chans, self.least_side))
        maps = []
        for index, level in enumerate(levels):
            state = self.advance(level, state)
            if index in take:
                maps.append(self.tap(state, index, norm))
        if output_fmt == "NCHW":
            maps = [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        if intermediates_only:
            return maps
        return self.end(state, norm=len(levels) == len(self.levels)), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the levels ``indices`` do not need; returns them as absolute numbers."""
        take, last = feature_take_indices(len(self.levels), _listed(indices))
        shortened = last < len(self.levels) - 1
        del self.levels[last + 1 :]
        if prune_norm or shortened:
            self.norm, self.num_features = nn.Identity().train(self.training), self.channels[last]
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

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay would harm: state matrices, skips, step-size biases, positions, class tokens."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in SPARED}

    def __prepare_scriptable__(self):
        raise NotImplementedError("TorchScript cannot compile the scans; use torch.compile or torch.export instead")


def _listed(indices: int | Sequence[int] | None) -> int | list[int] | None:
    return list(indices) if isinstance(indices, Sequence) else indices

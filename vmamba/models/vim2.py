"""ViM2, the Vision MambaMixer (arXiv:2403.19888v1): selective scans over tokens and over channels. There is no code.

The announced repository has none, and there are no weights; this is a reading of the paper. From the paper: VMamba's
scan with four routes as token mixer; the channel mixer of :mod:`vmamba.mixers.channel`; in a stage the input of each
mixer is a learned weighted sum of the outputs of all mixers before it and of the stage's input; depths and widths; two
token mixers for each channel mixer (its table; its text has one).

Open there and chosen here: the settings of the scan, stem and downsampling are those of VMamba's first generation
(16 states, rank c / 16, SiLU, a LayerNorm before each mixer and before its output layer, a gate of one linear layer);
all weights of the sums start at 1, which is a residual network, and the stage's output is such a sum too; channel
mixers fit maps of any size, as :mod:`vmamba.mixers.channel` says; stochastic depth is VMamba's.

That makes 24.0, 43.7 and 75.6 million parameters for tiny, small and base, where the paper has 20, 43 and 74. Tiny and
small differ by 12 token mixers and 6 channel mixers of one width: whatever is in them, 20 and 43 do not go together.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn

from vmamba.backbone import Backbone, Stage
from vmamba.block import PatchMerging, PatchStem, drop_path_rates
from vmamba.mixers.channel import ChannelMixer
from vmamba.mixers.ss2d import SS2D
from vmamba.norm import LayerNorm
from vmamba.registry import register


@register_notrace_module
class WeightedSum(nn.Module):
    """The sum of ``count`` maps, each times a learned number that starts at 1."""

    def __init__(self, count: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All weights 1."""
        nn.init.ones_(self.weight)

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps of one shape -> their weighted sum."""
        first, *others = (weight * y for weight, y in zip(self.weight.unbind(), maps, strict=True))
        return sum(others, first)


class MixerBlock(nn.Module):
    """mixer(norm(x)), and what comes next: a weighted sum of all that the stage has so far.

    Args:
        dim: channels c.
        mixer: builds the mixer, ``mixer(dim, device=..., dtype=...)``: (b, h, w, c) -> (b, h, w, c).
        place: how many mixers come before in the stage.
        drop_path: probability of dropping the mixer's output for a sample.
    """

    def __init__(self, dim: int, *, mixer: Callable, place: int, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, **dd)
        self.mixer = mixer(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.sum = WeightedSum(place + 2, **dd)

    def forward(self, x: Tensor, *earlier: Tensor) -> tuple[Tensor, Tensor]:
        """Input and, beginning with the stage's input, the maps so far -> next input, this mixer's output."""
        y = self.drop_path(self.mixer(self.norm(x)))
        return self.sum(*earlier, y), y


class MixerStage(Stage):
    """A stage of :class:`MixerBlock`: what each gives is kept for all that follow."""

    def run(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        maps = [x]
        for block in self.blocks:
            x, y = cast(Any, checkpoint)(block, x, *maps) if self.grad_checkpointing else block(x, *maps)
            maps.append(y)
        return x


class ViM2(Backbone):
    """Stem at stride 4, stages at strides 4, 8, 16, 32 with channels dim, 2 dim, 4 dim, 8 dim.

    Args:
        depths: layers per stage: token mixers, then a channel mixer.
        dim: channels of the first stage.
        token_mixers: token mixers in each layer.
        token_mixer: builds one, ``token_mixer(dim, scan=..., device=..., dtype=...)``.
        channel_mixers: per stage, builds a channel mixer, ``mixer(dim, device=..., dtype=...)``; may be longer than
            ``depths``.
        scan: the order in which the token mixers read the map: a name, ``"package.module"`` or a function.
        drop_path_rate: stochastic depth of the last mixer; it rises linearly from 0.
        **backbone: ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``, ``device``, ``dtype`` of
            :class:`Backbone`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dim: int,
        token_mixers: int = 2,
        token_mixer: Callable[..., nn.Module] = SS2D,
        channel_mixers: Sequence[Callable[..., nn.Module]] = (*[ChannelMixer] * 3, partial(ChannelMixer, expand=1.0)),
        scan: "str | Callable" = "cross",
        drop_path_rate: float = 0.0,
        **backbone,
    ):
        super().__init__(**backbone)
        dd = self._dd
        channels = [dim * 2**i for i in range(len(depths))]
        per_layer = token_mixers + 1
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, [depth * per_layer for depth in depths])):
            down = PatchMerging(channels[i - 1], channels[i], **dd) if i else nn.Identity()
            mixers = [*[partial(token_mixer, scan=scan)] * token_mixers, channel_mixers[i]] * depths[i]
            blocks = [
                MixerBlock(channels[i], mixer=mixer, place=place, drop_path=rate, **dd)
                for place, (mixer, rate) in enumerate(zip(mixers, rates, strict=True))
            ]
            stages.append(MixerStage(down, blocks))
        stem, strides = PatchStem(self.in_chans, dim, **dd), [4 * 2**i for i in range(len(depths))]
        self.build(stem, stages, channels=channels, strides=strides)


VARIANTS = {
    "vim2_tiny": dict(depths=(1, 1, 3, 1), dim=96, drop_path_rate=0.2),
    "vim2_small": dict(depths=(1, 1, 9, 1), dim=96, drop_path_rate=0.3),
    "vim2_base": dict(depths=(1, 1, 9, 1), dim=128, drop_path_rate=0.6),
}

register(
    ViM2,
    VARIANTS,
    keys=[],
    paper="2403.19888",
    origin="https://github.com/MambaMixer/M2",
    license="none stated",
    timm=dict(first_conv="stem.conv1", classifier="head.fc", pool_size=(7, 7)),
)

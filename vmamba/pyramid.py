"""Pyramid: a backbone without classifier that returns normalised maps for detectors and segmentors."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from vmamba.backbone import Backbone
from vmamba.norm import LayerNorm


class Pyramid(nn.Module):
    """(b, in_chans, h, w) -> maps (b, c_i, h / s_i, w / s_i), one per output, each with a norm of its own.

    Args:
        body: a backbone; its classifier, final norm and unused stages are dropped.
        out_indices: the stages whose maps are returned, in ascending order.
        norm: LayerNorm over the channels of each output; False for the bare maps.
    """

    def __init__(self, body: Backbone, *, out_indices: Sequence[int] = (0, 1, 2, 3), norm: bool = True):
        super().__init__()
        self.out_indices = tuple(sorted(body.prune_intermediate_layers(list(out_indices), prune_norm=True)))
        self.channels = tuple(body.channels[i] for i in self.out_indices)
        self.strides = tuple(body.strides[i] for i in self.out_indices)
        self.body = body
        dd = {"device": next(body.parameters()).device, "dtype": next(body.parameters()).dtype}
        self.norms = nn.ModuleList(LayerNorm(c, wide=True, **dd) if norm else nn.Identity() for c in self.channels)
        rules = [(rf"^outnorm{i}\.", f"norms.{slot}.") for slot, i in enumerate(self.out_indices)]
        self.official_keys = [*rules, *getattr(body, "official_keys", ()), (r"^(?=stem\.|stages\.)", "body.")]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) -> [(b, c_i, h / s_i, w / s_i), ...], contiguous"""
        maps = self.body.forward_intermediates(
            x, self.out_indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        maps = cast(list[Tensor], maps)
        return [norm(y).permute(0, 3, 1, 2).contiguous() for norm, y in zip(self.norms, maps, strict=True)]

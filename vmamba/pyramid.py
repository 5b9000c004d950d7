"""Pyramid: a backbone without classifier that returns normalised maps for detectors and segmentors."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from vmamba.backbone import Backbone
from vmamba.column_pyramid import ColumnPyramid
from vmamba.columnar import Columnar


def pyramid_of(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that makes a pyramid of networks of the class ``cls``: :class:`Pyramid` or :class:`ColumnPyramid`."""
    return ColumnPyramid if issubclass(cls, Columnar) else Pyramid


NORMS = {True: Backbone.output_norm, False: nn.Identity}


class Pyramid(nn.Module):
    """(b, in_chans, h, w) -> maps (b, c_i, h / s_i, w / s_i), one per output, each with a norm of its own.

    Args:
        body: a backbone; its classifier, final norm and unused stages are dropped.
        out_indices: the stages whose maps are returned, in ascending order; all by default.
        norm: a norm over the channels of each output; by default if the paper has one; False for the bare maps.
    """

    def __init__(self, body: Backbone, *, out_indices: Sequence[int] | None = None, norm: bool | None = None):
        super().__init__()
        levels = range(len(body.channels)) if out_indices is None else out_indices
        self.out_indices = tuple(sorted(body.prune_intermediate_layers(list(levels), prune_norm=True)))
        self.channels = tuple(body.channels[i] for i in self.out_indices)
        self.strides = tuple(body.strides[i] for i in self.out_indices)
        self.body = body
        dd = {"device": next(body.parameters()).device, "dtype": next(body.parameters()).dtype}
        published = type(body).output_norm
        build = published if norm is None or (norm and published is not nn.Identity) else NORMS[norm]
        self.norms = nn.ModuleList(build(c, **dd) for c in self.channels)
        rules = [(rf"^outnorm{i}\.", f"norms.{slot}.") for slot, i in enumerate(self.out_indices)]
        kept = "|".join(str(i) for i in range(len(body.stages)))
        left_out = [(rf"^(outnorm\d+|norm|head|head_dist|stages\.(?!({kept})\.)\d+)\..*", "")]
        inside = [(r"^(?=stem\.|stages\.)", "body.")]
        self.official_keys = [*rules, *getattr(body, "official_keys", ()), *left_out, *inside]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) -> [(b, c_i, h / s_i, w / s_i), ...], contiguous"""
        maps = self.body.forward_intermediates(
            x, self.out_indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        maps = cast(list[Tensor], maps)
        return [norm(y).permute(0, 3, 1, 2).contiguous() for norm, y in zip(self.norms, maps, strict=True)]

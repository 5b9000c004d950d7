"""ColumnPyramid: a column of blocks at one stride as a feature pyramid for detectors and segmentors."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.columnar import Columnar, quarters

States = Sequence[tuple[Tensor, Tensor]]  # (h, r) after each block


def hidden(states: States, index: int) -> Tensor:
    """A block's own output h, (b, l, c), without the residual stream."""
    return states[index][0]


def stream(states: States, index: int) -> Tensor:
    """The residual stream after a block, (b, l, c), as the next block takes it; after the last block h + r."""
    h, r = states[index]
    return r + h if index + 1 == len(states) else states[index + 1][1]


class ColumnPyramid(nn.Module):
    """(b, in_chans, h, w) -> maps (b, c_i, h / s_i, w / s_i) of the ``neck``: ``channels`` c_i at ``strides`` s_i.

    Args:
        body: a column of blocks; its classifier, final norm, class tokens and unused blocks are dropped.
        out_indices: blocks whose maps the neck takes, in ascending order; the last of each quarter by default.
        tap: what is taken of the blocks' results, ``tap(states, index)``: :func:`stream` or :func:`hidden`.
        neck: builds what makes a pyramid of the maps, ``neck(channels, stride, device=..., dtype=...)``.
    """

    def __init__(
        self,
        body: Columnar,
        *,
        out_indices: Sequence[int] | None = None,
        tap: Callable[[States, int], Tensor] = stream,
        neck: "Callable[..., Neck] | None" = None,
    ):
        super().__init__()
        levels = quarters(len(body.blocks)) if out_indices is None else out_indices
        self.out_indices = tuple(sorted(body.prune_intermediate_layers(list(levels), prune_norm=True)))
        body.drop_class_tokens()
        self.body, self._tap = body, tap
        weight = body.stem.proj.weight
        build = RescaledMaps if neck is None else neck
        self.neck = build(
            [body.channels[i] for i in self.out_indices], body.stem.stride, device=weight.device, dtype=weight.dtype
        )
        self.channels, self.strides = self.neck.channels, self.neck.strides
        outside = [(r"^(norm|head)\..*", ""), (r"^(?=stem\.|blocks\.)", "body.")]
        self.official_keys = [*self.neck.official_keys, *getattr(body, "official_keys", ()), *outside]

    def maps(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) -> what the neck takes: a map (b, c, h / s, w / s) for each of ``out_indices``."""
        state, states = self.body.begin(x), []
        for block in self.body.blocks:
            state = self.body.advance(block, state)
            states.append(state[:2])
        dtype = self.body.stem.proj.weight.dtype
        taps = [self.body.stem.to_map(self._tap(states, i).to(dtype), state[2]) for i in self.out_indices]
        return [y.permute(0, 3, 1, 2).contiguous() for y in taps]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) -> [(b, c_i, h / s_i, w / s_i), ...], contiguous"""
        return [y.contiguous() for y in self.neck(self.maps(x))]


class Neck(nn.Module):
    """Maps (b, c, h, w) at one stride -> maps of ``channels`` at ``strides``."""

    official_keys: Sequence[tuple[str, Any]] = ()
    channels: tuple[int, ...]
    strides: tuple[int, ...]


class RescaledMaps(Neck):
    """Each map at a stride of its own: up by transposed convolutions, down by maxima (BEiT, arXiv:2106.08254; Vim).

    Args:
        channels: of each map. stride: of all maps.
        strides: of the results, one for each map: from four times as fine to four times as coarse.

    Raises:
        ValueError: there are not as many maps as strides, or a stride is out of that range.
    """

    official_keys = ((r"^fpn(\d+)\.", lambda m: f"neck.levels.{int(m[1]) - 1}."),)

    def __init__(
        self, channels: Sequence[int], stride: int, *, strides: Sequence[int] = (4, 8, 16, 32), device=None, dtype=None
    ):
        super().__init__()
        _check(len(channels) == len(strides), stride, strides, f"{len(channels)} maps")
        self.channels, self.strides = tuple(channels), tuple(strides)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.levels = nn.ModuleList(
            nn.Sequential(*_rescaled(c, c, c, stride / s, nn.BatchNorm2d, **dd))
            for c, s in zip(channels, strides, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[(b, c, h, w), ...] -> [(b, c, h', w'), ...]"""
        return [level(y) for level, y in zip(self.levels, maps, strict=True)]


class SimpleFeaturePyramid(Neck):
    """All levels from the last map, each through a 1x1 and a 3x3 convolution with norms (ViTDet, arXiv:2203.16527).

    A last level is every second pixel of the coarsest.

    Args:
        channels: of each map, of which the last is used. stride: of all maps.
        out: channels of all results.
        strides: of the results but the last: from four times as fine to four times as coarse.

    Raises:
        ValueError: a stride is out of that range.
    """

    official_keys = ((r"^simfp_(\d+)\.", lambda m: f"neck.levels.{int(m[1]) - 2}."), (r"^net\.", ""))

    def __init__(
        self,
        channels: Sequence[int],
        stride: int,
        *,
        out: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check(True, stride, strides, "one map")
        self.channels, self.strides = (out,) * (len(strides) + 1), (*strides, 2 * strides[-1])
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        c = channels[-1]
        self.levels = nn.ModuleList()
        for s in strides:
            width = c // max(stride // s, 1)
            scaled = _rescaled(c, c // 2, width, stride / s, LayerNorm2d, **dd)
            smooth = ConvNorm(width, out, 1, **dd), ConvNorm(out, out, 3, padding=1, **dd)
            self.levels.append(nn.Sequential(*scaled, *smooth))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[..., (b, c, h, w)] -> [(b, out, h', w'), ...]"""
        levels = [level(maps[-1]) for level in self.levels]
        return [*levels, F.max_pool2d(levels[-1], 1, 2)]


class Coarser(nn.MaxPool2d):
    """Maxima of squares of pixels; a map that is smaller than such a square becomes one pixel."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, max(h // n, 1), max(w // n, 1))"""
        h, w = input.shape[2:]
        n = cast(int, self.kernel_size)
        return F.max_pool2d(input, (min(n, h), min(n, w)))


class ConvNorm(nn.Conv2d):
    """A convolution without bias and a LayerNorm over its channels."""

    def __init__(self, from_channels: int, to_channels: int, size: int, *, padding: int = 0, device=None, dtype=None):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(from_channels, to_channels, size, padding=padding, bias=False, **dd)
        self.norm = LayerNorm2d(to_channels, **dd)

    def forward(self, input: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c', h, w)"""
        return self.norm(super().forward(input))


FACTORS = (4, 2, 1, 0.5, 0.25)


def _rescaled(c: int, between: int, out: int, factor: float, norm: Callable[..., nn.Module], **dd) -> list[nn.Module]:
    """Layers that make a map of c channels ``factor`` times as fine, with ``out`` channels where it is finer."""
    up = nn.ConvTranspose2d
    layers: dict[float, Callable[[], list[nn.Module]]] = {
        4: lambda: [up(c, between, 2, 2, **dd), norm(between, **dd), nn.GELU(), up(between, out, 2, 2, **dd)],
        2: lambda: [up(c, out, 2, 2, **dd)],
        1: lambda: [],
        0.5: lambda: [Coarser(2)],
        0.25: lambda: [Coarser(4)],
    }
    return layers[factor]()


def _check(fits: bool, stride: int, strides: Sequence[int], maps: str) -> None:
    if not fits or any(stride / s not in FACTORS for s in strides):
        allowed = ", ".join(f"{stride / factor:g}" for factor in FACTORS)
        raise ValueError(f"cannot make strides {tuple(strides)} of {maps} at stride {stride}; choose from {allowed}")

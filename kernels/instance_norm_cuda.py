"""Instance normalisation, a residual and LeakyReLU in CUDA C++ (``instance_norm.cu``), forward and backward.

The equation is in ``instance_norm``. A map is read as (planes, pixels), a plane for each channel of each sample. One
that fits into a block is read once each way; larger ones are shared out to many blocks, which read a part twice, the
second time from the L2 cache. For the backward x is kept, and y where a residual was added.
"""

import sys
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmamba.kernels import nvrtc
from vmamba.kernels.backends import other_types
from vmamba.kernels.instance_norm import is_channels_last
from vmamba.kernels.instance_norm_function import normalised
from vmamba.kernels.layer_norm_cuda import TYPES

SOURCE = nvrtc.COMMON.with_name("instance_norm.cu")
THREADS = 256  # of a block, at most
WORDS = 32  # of 32 bits, that a thread holds of a map, if it is one; 16 of each of several
LARGEST = 1 << 30
AHEAD = 1  # parts for each multiprocessor, by which the first pass over large planes is ahead of the second


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (x, perhaps residual, weight, bias) can be normalised."""
    shape = tensors[0].shape
    if is_channels_last(tensors[0]):
        return f"it takes maps whose pixels lie side by side, got strides {tensors[0].stride()}"
    many = max(shape[:2].numel(), shape[2:].numel()) > LARGEST
    large = f"it takes up to {LARGEST} planes of as many pixels, got {tuple(shape)}" if many else None
    return other_types(tensors, tuple(TYPES)) or large or nvrtc.why_not()


class Kind(NamedTuple):
    """What a kernel is compiled for: types of x, residual and y; what there is of weights, slope and residual."""

    x: torch.dtype
    added: torch.dtype
    y: torch.dtype
    affine: bool
    act: bool
    add: bool
    deep: bool = False


class Plan(NamedTuple):
    """How a plane is dealt out: to ``parts`` blocks of ``threads`` with ``per`` packs of ``pack`` pixels each."""

    threads: int
    pack: int
    per: int
    parts: int


def plan(pixels: int, bytes: int, single: bool, aligned: bool) -> Plan:
    """For planes of so many pixels.

    Args:
        bytes: of the widest number. single: one map is read, not several. aligned: 16 bytes can be read at once.
    """
    pack = gcd(pixels, 16 // bytes) if aligned else 1
    most = WORDS // (1 if single else 2) // max(pack * bytes // 4, 1)
    packs = pixels // pack
    threads = min(max(_power(packs), 32), THREADS)
    needed = -(-packs // threads)
    per = min(_power(needed), most)
    return Plan(threads, pack, per, -(-needed // per))


def _power(n: int) -> int:
    """The least power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


def defines(kind: Kind, plan: Plan) -> tuple[str, ...]:
    """The compile-time settings of the source."""
    types = (f"{name}={TYPES[t]}" for name, t in zip(("IN", "ADDED", "OUT"), kind[:3], strict=True))
    flags = (f"{name}={int(on)}" for name, on in zip(("AFFINE", "ACT", "ADD", "DEEP"), kind[3:], strict=True))
    sizes = f"THREADS={plan.threads}", f"PACK={plan.pack}", f"PER={plan.per}", f"SPLIT={int(plan.parts > 1)}"
    return *types, *flags, *sizes, "T_FP32"


class Launch:
    """A kernel for maps of one shape."""

    def __init__(self, name: str, kind: Kind, shape: torch.Size, aligned: bool, device: int):
        self.planes, pixels = shape[0] * shape[1], shape[2:].numel()
        single, bytes = name == "forward" and not kind.add, max(t.itemsize for t in kind[:3])
        chosen = plan(pixels, bytes, single, aligned)
        self.run = nvrtc.kernel(SOURCE, name, defines(kind, chosen), device)
        self.threads, self.split, self.all = chosen.threads, chosen.parts > 1, self.planes * chosen.parts
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        ahead = min(chosen.parts + AHEAD * processors, self.all)
        self.sizes = self.planes, shape[1], pixels, chosen.parts, ahead

    def __call__(self, maps: tuple[Tensor, ...], results: Tensor, numbers: tuple[float, ...]) -> None:
        """Run on ``maps`` and their weights; ``results`` (2, planes), then numbers, are the last of its arguments."""
        of_parts = done = results
        if self.split:
            of_parts = results.new_empty(self.all, 2)
            done = results.new_zeros(self.planes, dtype=torch.int32)
        if self.all:
            grid = self.all * (1 + self.split), 1
            self.run(grid, self.threads, *maps, of_parts, done, results, *self.sizes, *numbers)


@lru_cache(maxsize=1024)
def _launch(name: str, kind: Kind, shape: torch.Size, aligned: bool, device: int) -> Launch:
    return Launch(name, kind, shape, aligned, device)


def _aligned(*tensors: Tensor) -> bool:
    return not any([t.data_ptr() % 16 for t in tensors])


def run_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> tuple[Tensor, Tensor]:
    """y, and mean and 1 / sqrt(var + eps) of every plane, (2, planes), of contiguous maps and float32 weights."""
    added = x if residual is None else residual
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, added.dtype))
    stats = x.new_empty(2, x.shape[0] * x.shape[1], dtype=torch.float32)
    scale, shift = (stats, stats) if weight is None or bias is None else (weight, bias)
    kind = Kind(x.dtype, added.dtype, y.dtype, weight is not None, slope != 1, residual is not None)
    launch = _launch("forward", kind, x.shape, _aligned(x, added), x.device.index)
    launch((x, added, scale, shift, y), stats, (float(eps), float(slope)))
    return y, stats


def run_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor, slope: float,
    added: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and the residual, and by sample those of bias and weight, (b, c)."""
    dx, sums = torch.empty_like(x), torch.empty_like(stats)
    dresidual, result = dx if added is None else torch.empty_like(x, dtype=added), dy if y is None else y
    scale, shift = (stats, stats) if weight is None or bias is None else (weight, bias)
    kind = Kind(x.dtype, dresidual.dtype, dy.dtype, weight is not None, slope != 1, y is not None, added is not None)
    launch = _launch("backward", kind, x.shape, _aligned(dy, x, result), x.device.index)
    launch((dy, x, result, scale, shift, stats, dx, dresidual), sums, (float(slope),))
    dbias, dweight = sums.view(2, *x.shape[:2])
    return dx, dresidual, dbias, dweight


def forward(x: Tensor, *arguments: Any) -> Tensor:
    """As :func:`vmamba.kernels.instance_norm_function.normalised` has it, pixels side by side."""
    return normalised(sys.modules[__name__], x.contiguous(), *arguments)

"""Layer normalisation in CUDA C++ (``layer_norm.cu``), forward and backward, for rows of up to 8192 channels.

The equation is in ``layer_norm_reference``. Rows stay in registers, so that one pass over memory does; x is read and
y written in whatever types the neighbours have. Sums over rows (gradients of weight and bias) are taken per block and
then over blocks, in a fixed order. What a residual stream adds to it is in ``residual_norm``.
"""

import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vmamba.kernels import nvrtc
from vmamba.kernels.backends import other_types

SOURCE = Path(__file__).with_name("layer_norm.cu")
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
LEAST = 0  # numbers; smaller maps are left to PyTorch
WIDEST = 8192
THREADS = 256
BLOCKS = 132  # in the backward, each with its own sums over rows: one for each multiprocessor of an H200
FEW = 12  # numbers in a lane, up to which twice as many fit


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (x, weight, bias) can be normalised; the device is the business of ``backends``."""
    channels = tensors[0].shape[-1]
    wider = f"it takes up to {WIDEST} channels, got {channels}" if channels > WIDEST else None
    return other_types(tensors, tuple(TYPES)) or wider or nvrtc.why_not()


class Plan(NamedTuple):
    """How a row is dealt out: to ``lanes`` lanes, each ``per`` packs of ``pack`` channels."""

    lanes: int
    per: int
    pack: int


@cache
def plan(channels: int, aligned: bool) -> Plan:
    """For rows of so many channels; ``aligned``: four of them can be read at once."""
    pack = 4 if aligned and channels % 4 == 0 else 1
    lanes = next(n for n in (8, 16, 32, 64, 128, 256) if channels <= (24 if n == 32 else 16) * n or n == 256)
    per = -(-channels // (lanes * pack))
    return Plan(lanes, per, pack)


class Kind(NamedTuple):
    """What a kernel is compiled for: types of x, branch, y and weight; whether branch, factor, dstream are there."""

    x: torch.dtype
    added: torch.dtype
    y: torch.dtype
    weight: torch.dtype
    add: bool = False
    factor: bool = False
    deep: bool = False


def defines(kind: Kind, row: Plan) -> tuple[str, ...]:
    """The compile-time settings of the source."""
    types = (f"{name}={TYPES[t]}" for name, t in zip(("IN", "ADDED", "OUT", "WEIGHT"), kind[:4], strict=True))
    flags = (f"{name}={int(on)}" for name, on in zip(("ADD", "FACTOR", "DEEP"), kind[4:], strict=True))
    return *types, *flags, "T_FP32", *(f"{name.upper()}={value}" for name, value in row._asdict().items())


@cache
def _kernel(name: str, kind: Kind, channels: int, aligned: bool, device: int) -> tuple[nvrtc.Kernel, int]:
    """The kernel, and rows that a block of it holds at once."""
    row = plan(channels, aligned)
    return nvrtc.kernel(SOURCE, name, defines(kind, row), device), THREADS // row.lanes


def run_forward(
    x: Tensor,
    branch: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y in ``dtype`` and the stream, both (..., c), of contiguous tensors; x itself where there is no branch."""
    y = torch.empty_like(x, dtype=dtype)
    stream, added = (x, x) if branch is None else (torch.empty_like(x), branch)
    unaligned = (x.data_ptr() | added.data_ptr() | weight.data_ptr() | bias.data_ptr()) % 16 != 0
    types = x.dtype, added.dtype, dtype, weight.dtype, branch is not None, factor is not None
    run, grid, sizes = _planned(types, x.shape, not unaligned, x.device.index)
    if grid[0]:
        run(grid, THREADS, x, added, weight if factor is None else factor, weight, bias, stream, y, *sizes, float(eps))
    return y, stream


@lru_cache(maxsize=1024)
def _planned(types: tuple, shape: torch.Size, aligned: bool, device: int) -> tuple[nvrtc.Kernel, tuple, tuple]:
    """The forward's kernel and grid, and rows, channels and rows of a sample."""
    channels = shape[-1]
    rows = math.prod(shape[:-1])
    run, held = _kernel("forward", Kind(*types), channels, aligned, device)
    return run, (-(-rows // held), 1), (rows, channels, max(rows // max(shape[0], 1), 1))


def run_backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    eps: float,
    added: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the branch in its type ``added`` (x's where that is None), and of weight and bias, (2, c)."""
    dx, deep = torch.empty_like(stream), stream if dstream is None else dstream
    apart = added is not None and (factor is not None or added != stream.dtype)
    dbranch = torch.empty_like(stream, dtype=added) if apart else dx
    unaligned = (dy.data_ptr() | deep.data_ptr() | stream.data_ptr() | weight.data_ptr()) % 16 != 0
    types = stream.dtype, dbranch.dtype, dy.dtype, weight.dtype, apart, factor is not None, dstream is not None
    run, finish, blocks, sizes = _planned_back(types, stream.shape, not unaligned, stream.device.index)
    rows, channels, _ = sizes
    sums = stream.new_empty(blocks, 2, channels, dtype=torch.float32)
    total = stream.new_empty(2, channels, dtype=torch.float32)
    if rows:
        kept = weight if factor is None else factor
        run((blocks, 1), THREADS, dy, deep, stream, kept, weight, dx, dbranch, sums, *sizes, float(eps))
    finish((-(-2 * channels // 32), 1), THREADS, sums, total, blocks, 2 * channels)
    return dx, dbranch, total


@lru_cache(maxsize=1024)
def _planned_back(types: tuple, shape: torch.Size, aligned: bool, device: int) -> tuple:
    """The backward's two kernels, blocks of the first, and rows, channels and rows of a sample."""
    channels, rows = shape[-1], math.prod(shape[:-1])
    run, held = _kernel("backward", Kind(*types), channels, aligned, device)
    finish, _ = _kernel("finish", Kind(*types), channels, aligned, device)
    row = plan(channels, aligned)
    blocks = min(BLOCKS * (2 if row.per * row.pack <= FEW else 1), -(-rows // held))
    return run, finish, blocks, (rows, channels, max(rows // max(shape[0], 1), 1))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return run_forward(x, None, None, weight, bias, eps, dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, _, sums = run_backward(dy.contiguous(), None, x, None, weight, ctx.eps, None)
        dweight, dbias = sums.to(weight.dtype)
        return dx, dweight, dbias, None, None


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., c) -> (..., c) in ``dtype``, computed in float32; differentiable once."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.to(weight.dtype).contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _LayerNorm.apply(x, weight, bias, eps, dtype)
    return run_forward(x, None, None, weight, bias, eps, dtype)[0]

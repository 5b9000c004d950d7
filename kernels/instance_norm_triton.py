"""Instance normalisation, a residual and LeakyReLU in Triton for channels-last maps, forward and backward.

The equation is in ``instance_norm``. A map is read as (b, pixels, channels). Programs sum up parts of a sample's pixels
for a block of channels; the parts are added in a fixed order, and a second pass makes the result. Where a sample is one
part, its program does all of it. For the backward x is kept, and y where a residual was added.
"""

import sys
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels.backends import other_types
from vmamba.kernels.instance_norm import is_channels_last
from vmamba.kernels.instance_norm_function import normalised

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE = 2048  # numbers that a program has in registers at once
WIDEST = 64  # channels of a program
PROGRAMS = 1024  # that read at the same time
ALONE = 4  # tiles: so many of a sample are left to one program
FOLDED = 128  # parts that are added at once


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (x, perhaps residual, weight, bias) can be normalised."""
    wrong = None if is_channels_last(tensors[0]) else f"it takes channels-last maps, got strides {tensors[0].stride()}"
    return other_types(tensors, DTYPES) or wrong


@triton.jit
def _first(x, sample, pixels, channels, c):
    """A sample's first pixel, which the forward's sums take off: near the mean, more often than not."""
    return tl.load(x + sample * pixels * channels + c, c < channels, 0).to(tl.float32)


@triton.jit
def _moments(x, y, dy, stats, weight, bias, n, sample, i0, pixels, channels, c, slope,
             BACK: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
             TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Of pixels from i0 on: forward the sums of x - first and its square; backward of g and g times normalised x."""
    a = tl.zeros([ROWS, WIDTH], tl.float32)
    b = tl.zeros([ROWS, WIDTH], tl.float32)
    if not BACK:
        first = _first(x, sample, pixels, channels, c)
    for t in range(TILES):
        i = i0 + t * ROWS + tl.arange(0, ROWS)
        inside = (i < pixels)[:, None] & (c < channels)[None, :]
        at = (sample * pixels + i)[:, None] * channels + c[None, :]
        v = tl.load(x + at, inside, 0).to(tl.float32)
        if BACK:
            mean, scale = tl.load(stats + n, c < channels, 0), tl.load(stats + n + 1, c < channels, 0)
            v = (v - mean[None, :]) * scale[None, :]
            g = _slanted(dy, y, v, weight, bias, at, inside, c, channels, slope, AFFINE, ACT, ADD)
            a += g
            b += g * v
        else:
            v = tl.where(inside, v - first[None, :], 0)
            a += v
            b += v * v
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _slanted(dy, y, v, weight, bias, at, inside, c, channels, slope,
             AFFINE: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """The gradient before LeakyReLU; v is normalised x."""
    g = tl.load(dy + at, inside, 0).to(tl.float32)
    if ACT:
        if ADD:
            z = tl.load(y + at, inside, 0).to(tl.float32)
        else:
            z = v
            if AFFINE:
                z = z * tl.load(weight + c, c < channels, 0)[None, :] + tl.load(bias + c, c < channels, 0)[None, :]
        g = tl.where(z > 0, g, g * slope)
    return g


@triton.jit
def _finished(a, b, first, pixels, eps):
    """Mean and 1 / sqrt(var + eps) of the forward's sums."""
    mean = a / pixels
    return first + mean, tl.rsqrt(tl.maximum(b / pixels - mean * mean, 0) + eps)


@triton.jit
def _written(x, residual, y, weight, bias, mean, scale, sample, i0, pixels, channels, c, slope,
             AFFINE: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
             TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The forward's second pass."""
    if AFFINE:
        factor = scale * tl.load(weight + c, c < channels, 0)
        shift = tl.load(bias + c, c < channels, 0) - mean * factor
    else:
        factor = scale
        shift = -mean * scale
    for t in range(TILES):
        i = i0 + t * ROWS + tl.arange(0, ROWS)
        inside = (i < pixels)[:, None] & (c < channels)[None, :]
        at = (sample * pixels + i)[:, None] * channels + c[None, :]
        z = tl.load(x + at, inside, 0).to(tl.float32) * factor[None, :] + shift[None, :]
        if ADD:
            z += tl.load(residual + at, inside, 0).to(tl.float32)
        if ACT:
            z = tl.where(z > 0, z, z * slope)
        tl.store(y + at, z, inside)


@triton.jit
def _written_back(x, y, dy, dx, dresidual, weight, bias, stats, a, b, n, sample, i0, pixels, channels, c, slope,
                  AFFINE: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
                  TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The backward's second pass."""
    mean, scale = tl.load(stats + n, c < channels, 0), tl.load(stats + n + 1, c < channels, 0)
    factor = scale
    if AFFINE:
        factor = scale * tl.load(weight + c, c < channels, 0)
    for t in range(TILES):
        i = i0 + t * ROWS + tl.arange(0, ROWS)
        inside = (i < pixels)[:, None] & (c < channels)[None, :]
        at = (sample * pixels + i)[:, None] * channels + c[None, :]
        v = (tl.load(x + at, inside, 0).to(tl.float32) - mean[None, :]) * scale[None, :]
        g = _slanted(dy, y, v, weight, bias, at, inside, c, channels, slope, AFFINE, ACT, ADD)
        if ADD:
            tl.store(dresidual + at, g, inside)
        tl.store(dx + at, (g - (a / pixels)[None, :] - v * (b / pixels)[None, :]) * factor[None, :], inside)


@triton.jit
def _second_pass(x, added, y, dy, dx, stats, weight, bias, a, b, n, sample, i0, pixels, channels, c, slope,
                 BACK: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
                 TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Of pixels from i0 on, with what the first pass found; ``added`` as in ``_Maps``."""
    if BACK:
        _written_back(x, y, dy, dx, added, weight, bias, stats, a, b, n, sample, i0, pixels, channels, c, slope,
                      AFFINE, ACT, ADD, TILES, ROWS, WIDTH)  # fmt: skip
    else:
        _written(x, added, y, weight, bias, a, b, sample, i0, pixels, channels, c, slope,
                 AFFINE, ACT, ADD, TILES, ROWS, WIDTH)  # fmt: skip


@triton.jit
def _partial_kernel(
    x, y, dy, stats, weight, bias, sums, pixels, channels, slope,
    BACK: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    part, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    n = (sample * channels + c) * 2
    i0 = part.to(tl.int64) * (TILES * ROWS)
    a, b = _moments(x, y, dy, stats, weight, bias, n, sample, i0, pixels, channels, c, slope,
                    BACK, AFFINE, ACT, ADD, TILES, ROWS, WIDTH)  # fmt: skip
    at = ((sample * tl.num_programs(0) + part) * channels + c) * 2
    tl.store(sums + at, a, c < channels)
    tl.store(sums + at + 1, b, c < channels)


@triton.jit
def _fold_kernel(
    x, sums, results, pixels, channels, parts, eps, BACK: tl.constexpr, FOLDED: tl.constexpr, WIDTH: tl.constexpr
):
    sample = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    a = tl.zeros([FOLDED, WIDTH], tl.float32)
    b = tl.zeros([FOLDED, WIDTH], tl.float32)
    for p in range(0, parts, FOLDED):
        part = p + tl.arange(0, FOLDED)
        inside = (part < parts)[:, None] & (c < channels)[None, :]
        at = ((sample * parts + part)[:, None] * channels + c[None, :]) * 2
        a += tl.load(sums + at, inside, 0)
        b += tl.load(sums + at + 1, inside, 0)
    one, two = tl.sum(a, 0), tl.sum(b, 0)
    if not BACK:
        one, two = _finished(one, two, _first(x, sample, pixels, channels, c), pixels, eps)
    n = (sample * channels + c) * 2
    tl.store(results + n, one, c < channels)
    tl.store(results + n + 1, two, c < channels)


@triton.jit
def _write_kernel(
    x, added, y, dy, dx, stats, results, weight, bias, pixels, channels, slope,
    BACK: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    n = (sample * channels + c) * 2
    i0 = tl.program_id(0).to(tl.int64) * (TILES * ROWS)
    a, b = tl.load(results + n, c < channels, 0), tl.load(results + n + 1, c < channels, 0)
    _second_pass(x, added, y, dy, dx, stats, weight, bias, a, b, n, sample, i0, pixels, channels, c, slope,
                 BACK, AFFINE, ACT, ADD, TILES, ROWS, WIDTH)  # fmt: skip


@triton.jit
def _whole_kernel(
    x, added, y, dy, dx, stats, results, weight, bias, pixels, channels, slope, eps,
    BACK: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    n = (sample * channels + c) * 2
    i0 = sample * 0
    a, b = _moments(x, y, dy, stats, weight, bias, n, sample, i0, pixels, channels, c, slope,
                    BACK, AFFINE, ACT, ADD, TILES, ROWS, WIDTH)  # fmt: skip
    if not BACK:
        a, b = _finished(a, b, _first(x, sample, pixels, channels, c), pixels, eps)
    tl.store(results + n, a, c < channels)
    tl.store(results + n + 1, b, c < channels)
    _second_pass(x, added, y, dy, dx, stats, weight, bias, a, b, n, sample, i0, pixels, channels, c, slope,
                 BACK, AFFINE, ACT, ADD, TILES, ROWS, WIDTH)  # fmt: skip


class _Maps(NamedTuple):
    """What both passes read and write; where there is none of something, another tensor that is not touched.

    Forward: ``added`` is the residual. Backward: its gradient.
    """

    x: Tensor
    added: Tensor
    y: Tensor
    dy: Tensor
    dx: Tensor
    stats: Tensor


def _run(maps: _Maps, weight: Tensor | None, bias: Tensor | None, flags: tuple[bool, bool, bool], numbers) -> Tensor:
    """(b, c, 2): mean and 1 / sqrt(var + eps), or the gradients of bias and weight by sample.

    ``flags``: backward, LeakyReLU, residual; ``numbers``: slope, eps.
    """
    x, (back, act, add), (slope, eps) = maps.x, flags, numbers
    b, channels, pixels = x.shape[0], x.shape[1], x.shape[2:].numel()
    width = min(WIDEST, triton.next_power_of_2(channels))
    rows, blocks = TILE // width, triton.cdiv(channels, width)
    tiles = triton.cdiv(pixels, rows)
    results = x.new_empty(b, channels, 2, dtype=torch.float32)
    scale, shift = (results, results) if weight is None or bias is None else (weight, bias)
    options = {"BACK": back, "AFFINE": weight is not None, "ACT": act, "ADD": add, "ROWS": rows, "WIDTH": width}
    with torch.cuda.device_of(x):
        if tiles <= ALONE:
            _whole_kernel[(blocks, b)](
                *maps, results, scale, shift, pixels, channels, slope, eps, TILES=tiles, **options
            )
            return results
        each = triton.next_power_of_2(triton.cdiv(tiles * b * blocks, PROGRAMS))  # tiles of a part
        parts = triton.cdiv(tiles, each)
        sums = x.new_empty(b, parts, channels, 2, dtype=torch.float32)
        sizes = pixels, channels
        _partial_kernel[(parts, blocks, b)](
            x, maps.y, maps.dy, maps.stats, scale, shift, sums, *sizes, slope, TILES=each, **options
        )
        _fold_kernel[(blocks, b)](
            x, sums, results, *sizes, parts, eps, BACK=back, FOLDED=FOLDED, WIDTH=width, num_warps=8
        )
        _write_kernel[(tiles, blocks, b)](*maps, results, scale, shift, *sizes, slope, TILES=1, **options)
    return results


def run_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> tuple[Tensor, Tensor]:
    """y, and (b, c, 2) of mean and 1 / sqrt(var + eps), of channels-last maps and float32 weights."""
    added = x if residual is None else residual
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, added.dtype))
    maps = _Maps(x, added, y, x, x, x)
    return y, _run(maps, weight, bias, (False, slope != 1, residual is not None), (float(slope), float(eps)))


def run_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor, slope: float,
    added: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and the residual, and by sample those of bias and weight, (b, c)."""
    dx = torch.empty_like(x)
    dresidual = dx if y is None else torch.empty_like(x, dtype=added or dy.dtype)
    maps = _Maps(x, dresidual, dy if y is None else y, dy, dx, stats)
    dbias, dweight = _run(maps, weight, bias, (True, slope != 1, y is not None), (float(slope), 0.0)).unbind(-1)
    return dx, dresidual, dbias, dweight


def forward(*arguments: Any) -> Tensor:
    """As :func:`vmamba.kernels.instance_norm_function.normalised` has it, of channels-last maps."""
    return normalised(sys.modules[__name__], *arguments)

"""Layer normalisation in Triton, forward and backward, for rows of up to 8192 channels; see ``layer_norm_reference``.

A program holds whole rows, a power of two of them, so that one pass over memory does: x is read and y written once,
in the type that the next matrix product takes. The backward recomputes mean and variance; sums over rows (gradients of
weight and bias) are taken per program and then over programs, in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels.backends import other_types

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST = 1 << 21  # numbers; below, a GPU waits for the host, and PyTorch's own norm is issued faster
WIDEST = 8192
TILE = 2048  # about so many numbers per program and step
PROGRAMS = 1024  # in the backward, each with its own sums over rows


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors can be normalised; the device is the business of ``backends``."""
    channels = tensors[0].shape[-1]
    wider = f"it takes up to {WIDEST} channels, got {channels}" if channels > WIDEST else None
    return other_types(tensors, DTYPES) or wider


@triton.jit
def _normalised(x, at, inside, in_c, channels, eps):
    """Rows (x - mean) / std in float32, and 1 / std."""
    row = tl.load(x + at, inside, 0).to(tl.float32)
    centred = tl.where(in_c, row - (tl.sum(row, 1) / channels)[:, None], 0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / channels + eps)
    return centred * scale[:, None], scale


@triton.jit
def _forward_kernel(x, weight, bias, y, rows, channels, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    in_c = (c < channels)[None, :]
    inside = (r < rows)[:, None] & in_c
    at = r[:, None] * channels + c[None, :]
    normalised, _ = _normalised(x, at, inside, in_c, channels, eps)
    w = tl.load(weight + c, c < channels, 0).to(tl.float32)
    b = tl.load(bias + c, c < channels, 0).to(tl.float32)
    tl.store(y + at, normalised * w[None, :] + b[None, :], inside)


@triton.jit
def _backward_kernel(
    dy, x, weight, dx, dweight, dbias, rows, channels, eps, steps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    c = tl.arange(0, WIDTH)
    in_c = (c < channels)[None, :]
    w = tl.load(weight + c, c < channels, 0).to(tl.float32)[None, :]
    sum_w = tl.zeros([ROWS, WIDTH], tl.float32)
    sum_b = tl.zeros([ROWS, WIDTH], tl.float32)
    first = tl.program_id(0).to(tl.int64) * steps * ROWS + tl.arange(0, ROWS)
    for step in range(steps):
        r = first + step * ROWS
        inside = (r < rows)[:, None] & in_c
        at = r[:, None] * channels + c[None, :]
        normalised, scale = _normalised(x, at, inside, in_c, channels, eps)
        g = tl.load(dy + at, inside, 0).to(tl.float32)
        sum_w += g * normalised
        sum_b += g
        g *= w
        mean = tl.sum(g, 1) / channels
        along = tl.sum(g * normalised, 1) / channels
        tl.store(dx + at, (g - mean[:, None] - normalised * along[:, None]) * scale[:, None], inside)
    tl.store(dweight + tl.program_id(0) * channels + c, tl.sum(sum_w, 0), c < channels)
    tl.store(dbias + tl.program_id(0) * channels + c, tl.sum(sum_b, 0), c < channels)


def _sizes(x: Tensor) -> tuple[int, int, dict[str, int]]:
    channels = x.shape[-1]
    width = triton.next_power_of_2(channels)
    tile = {"ROWS": max(1, TILE // width), "WIDTH": width, "num_warps": 4 if width <= TILE else 8}
    return x.numel() // channels, channels, tile


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        y = torch.empty_like(x, dtype=dtype)
        rows, channels, tile = _sizes(x)
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](x, weight, bias, y, rows, channels, eps, **tile)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        rows, channels, tile = _sizes(x)
        dx = torch.empty_like(x)
        steps = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), PROGRAMS)
        programs = triton.cdiv(rows, tile["ROWS"] * steps)
        sums = x.new_empty(2, programs, channels, dtype=torch.float32)
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                grads[0].contiguous(), x, weight, dx, sums[0], sums[1], rows, channels, ctx.eps, steps, **tile
            )
        dweight, dbias = sums.sum(1)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., c) -> (..., c) in ``dtype``, computed in float32; differentiable once."""
    return _LayerNorm.apply(x, weight, bias, eps, dtype)

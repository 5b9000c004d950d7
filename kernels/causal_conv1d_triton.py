"""Causal depthwise convolution in Triton, forward and backward, any strides; equation: ``causal_conv1d_reference``.

One kernel filters: forward with the weights as they are; backward, after the slope of SiLU is applied, the gradient
with the weights reversed. Sums over steps and batch come from partial sums in a fixed order: no atomics.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels.backends import other_types

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN, SILU, SILU_GRADIENT = range(3)


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors' types can be filtered; the device is the business of ``backends``."""
    return other_types(tensors, TYPES)


@triton.jit
def _load(x, initial, b, c, t, d, length, xb, xd, xl, ib, id, il, before, real: tl.constexpr):
    """x (b, c, t) for channels c (BD, 1) and steps t (1, BL); ``initial`` before step 0, zero elsewhere outside."""
    value = tl.load(x + b * xb + c * xd + t * xl, mask=(c < d) & (t >= 0) & (t < length), other=0).to(real)
    if initial is not None:
        past = (c < d) & (t < 0) & (t + before >= 0)
        value += tl.load(initial + b * ib + c * id + (t + before) * il, mask=past, other=0).to(real)
    return value


@triton.jit
def _filter(
    x, initial, weight, bias, dy, y, d, length, out_length, shift, before,
    xb, xd, xl, ib, id, il, wd, ww, gb, gd, gl, yb, yd, yl,
    W: tl.constexpr, MODE: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """y[t] = f(bias + sum_j weight[j] x[t + j - shift]); f is nothing, SiLU, or dy times SiLU's slope."""
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)[:, None]
    t = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)[None, :]
    real: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    out = tl.zeros((BD, BL), real)
    if bias is not None:
        out += tl.load(bias + c, mask=c < d, other=0).to(real)
    for j in range(W):
        w = tl.load(weight + c * wd + j * ww, mask=c < d, other=0).to(real)
        out += w * _load(x, initial, b, c, t + j - shift, d, length, xb, xd, xl, ib, id, il, before, real)
    mask = (c < d) & (t < out_length)
    if MODE > 0:
        slope = 1 / (1 + tl.exp(-out))
        if MODE == 1:
            out *= slope
        else:
            out = slope * (1 + out * (1 - slope)) * tl.load(dy + b * gb + c * gd + t * gl, mask=mask, other=0).to(real)
    tl.store(y + b * yb + c * yd + t * yl, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _sum(
    x, initial, g, sums, d, length, xb, xd, xl, ib, id, il, gb, gd, gl,
    W: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Partial sums over a block of steps: of g x[t + j - (W - 1)] in row j of sums (parts, W + 1, d), of g in row W."""
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)[:, None]
    t = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)[None, :]
    real: tl.constexpr = sums.dtype.element_ty
    row = sums + (b * tl.num_programs(0) + tl.program_id(0)) * (W + 1) * d + c
    dy = tl.load(g + b * gb + c * gd + t * gl, mask=(c < d) & (t < length), other=0).to(real)
    for j in range(W):
        value = _load(x, initial, b, c, t + j - (W - 1), d, length, xb, xd, xl, ib, id, il, W - 1, real)
        tl.store(row + j * d, tl.sum(dy * value, 1)[:, None], mask=c < d)
    tl.store(row + W * d, tl.sum(dy, 1)[:, None], mask=c < d)


def forward(x, weight, bias, initial, silu):
    """x (b, d, l), weight (d, w), bias (d,), initial (b, d, w - 1) -> y (b, d, l) in x's dtype and layout."""
    before = weight.shape[1] - 1
    return _run(torch.empty_like(x), x, weight, bias, initial, None, before, SILU if silu else PLAIN)


def backward(dy, x, weight, bias, initial, silu):
    """Gradients of x, weight, bias, initial (None where the input is None), each in its input's dtype."""
    real = torch.promote_types(x.dtype, torch.float32)
    b, d, length = x.shape
    w = weight.shape[1]
    g = _run(torch.empty_like(x, dtype=real), x, weight, bias, initial, dy, w - 1, SILU_GRADIENT) if silu else dy
    reverse = weight.flip(1)
    dx = _run(torch.empty_like(x), g, reverse, None, None, None, 0, PLAIN)
    dinitial = None if initial is None else torch.empty_like(initial)
    if dinitial is not None:
        _run(dinitial, g, reverse, None, None, None, w - 1, PLAIN)
    grid, tile = _tile(x)
    sums = x.new_zeros(b, grid[0], w + 1, d, dtype=real)
    if x.numel():
        with _on(x):
            _sum[grid](x, initial, g, sums, d, length, *x.stride(), *_strides(initial), *g.stride(), W=w, **tile)
    sums = sums.sum((0, 1))
    dbias = None if bias is None else sums[w].to(bias.dtype)
    return dx, sums[:w].T.to(weight.dtype), dbias, dinitial


def _run(y: Tensor, x, weight, bias, initial, dy, shift: int, mode: int) -> Tensor:
    """Filter x into y; see :func:`_filter`."""
    d, w = weight.shape
    grid, tile = _tile(y)
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        with _on(x):
            _filter[grid](
                x, initial, weight, bias, dy, y, d, x.shape[2], y.shape[2], shift, w - 1,
                *x.stride(), *_strides(initial), *weight.stride(), *_strides(dy), *y.stride(), W=w, MODE=mode, **tile,
            )  # fmt: skip
    return y


def _tile(x: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and block of channels and steps, long where memory is contiguous; steps along the grid's longest side."""
    b, d, length = x.shape
    long, short = (256, 4) if x.stride(2) <= x.stride(1) else (32, 64)
    return (triton.cdiv(length, long), triton.cdiv(d, short), b), {"BD": short, "BL": long}


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()


def _on(t: Tensor):
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()

"""Sums of rows in Triton, in one pass over memory; the equation is in ``routes_reference``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels.backends import other_types

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TILE = 2048  # numbers per program


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors' types can be read; the device is the business of ``backends``."""
    return other_types(tensors[:1], DTYPES)


@triton.jit(do_not_specialize=["p", "count", "visits"])
def _rows_kernel(x, index, y, p, count, d, visits, real: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    blocks = tl.cdiv(d, BD)
    i = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    x += tl.program_id(1).to(tl.int64) * p * d
    y += tl.program_id(1).to(tl.int64) * count * d
    total = tl.zeros([ROWS, BD], real)
    for v in range(visits):
        row = tl.load(index + v * count + i, i < count, p)
        there = (row < p)[:, None] & (c < d)[None, :]
        total += tl.load(x + row[:, None] * d + c[None, :], there, 0).to(real)
    tl.store(y + i[:, None] * d + c[None, :], total, (i < count)[:, None] & (c < d)[None, :])


def rows(x: Tensor, index: Tensor, padded: bool) -> Tensor:
    """x (b, p, d), index (v, i) -> (b, i, d) in x's dtype, summed in float32 at least; p stands for a zero row."""
    (b, p, d), (visits, count) = x.shape, index.shape
    y = x.new_empty(b, count, d)
    width = min(triton.next_power_of_2(d), 256)
    height = max(1, TILE // width)
    real = tl.float64 if x.dtype == torch.float64 else tl.float32
    if y.numel():
        with torch.cuda.device_of(x):
            grid = triton.cdiv(count, height) * triton.cdiv(d, width), b
            _rows_kernel[grid](x.contiguous(), index.contiguous(), y, p, count, d, visits, real, height, width)
    return y

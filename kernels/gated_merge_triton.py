"""The gated sum of routes in Triton, in one pass over memory: reads y through the table, z once, writes the result.

For inference; where gradients are asked for, ``gated_merge`` goes step by step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels.backends import other_types
from vmamba.kernels.routes import Table

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE, WIDTH = 2048, 128  # numbers of a program, and at most so many channels of them


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors' types can be read; the device is the business of ``backends``."""
    return other_types(tensors[:2], DTYPES)


@triton.jit(do_not_specialize=["pixels", "steps", "divisor"])
def _kernel(
    y, z, inverse, out, pixels, steps, d, z_batch, z_row, divisor, V: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr
):
    blocks = tl.cdiv(d, BD)
    i = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    b = tl.program_id(1).to(tl.int64)
    in_i, in_c = i < pixels, (c < d)[None, :]
    inside = in_i[:, None] & in_c
    y += b * steps * d
    gate = tl.load(z + b * z_batch + i.to(tl.int64)[:, None] * z_row + c[None, :], inside, 0).to(tl.float32)
    total = tl.zeros([ROWS, BD], tl.float32)
    for v in tl.static_range(V):
        step = tl.load(inverse + v * pixels + i, in_i, steps)
        there = (step < steps)[:, None] & in_c
        total += tl.load(y + step.to(tl.int64)[:, None] * d + c[None, :], there, 0).to(tl.float32)
    total *= gate * tl.sigmoid(gate) / divisor
    tl.store(out + (b * pixels + i)[:, None] * d + c[None, :], total, inside)


def forward(y: Tensor, z: Tensor, table: Table, divisor: float, dtype: torch.dtype) -> Tensor:
    """y (b, k, l, d), z (b, p, d) of any strides -> (b, p, d) in ``dtype``, computed in float32."""
    y, z = y.contiguous(), z if z.stride(2) == 1 else z.contiguous()
    (b, pixels, d), (visits, _) = z.shape, table.inverse.shape
    out = torch.empty(b, pixels, d, dtype=dtype, device=y.device)
    width = min(triton.next_power_of_2(d), WIDTH)
    rows = TILE // width
    grid = triton.cdiv(pixels, rows) * triton.cdiv(d, width), b
    sizes = pixels, table.routes.numel(), d, z.stride(0), z.stride(1), divisor
    if out.numel():
        with torch.cuda.device_of(y):
            _kernel[grid](y, z, table.inverse, out, *sizes, visits, rows, width)
    return out

"""The causal convolution along routes in Triton: reads the map through the table, writes each route once.

For inference; where gradients are asked for, ``route_conv`` goes step by step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels.backends import other_types
from vmamba.kernels.routes import Table

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STEPS, WIDTH = 32, 64  # of a program


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors' types can be filtered; the device is the business of ``backends``."""
    return other_types(tensors[:1], DTYPES)


@triton.jit(do_not_specialize=["p", "length"])
def _kernel(
    x, weight, bias, routes, u, p, length, d, x_batch, x_row, W: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr
):
    blocks = tl.cdiv(d, BD)
    t = tl.program_id(0) // blocks * STEPS + tl.arange(0, STEPS)
    c = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    k, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    in_c = (c < d)[None, :]
    x += b * x_batch
    routes += k * length
    total = tl.zeros([STEPS, BD], tl.float32) + tl.load(bias + k * d + c, c < d, 0).to(tl.float32)[None, :]
    for j in tl.static_range(W):
        step = t - W + 1 + j
        pixel = tl.load(routes + step, (step >= 0) & (step < length), p)
        at = pixel.to(tl.int64)[:, None] * x_row + c[None, :]
        row = tl.load(x + at, (pixel < p)[:, None] & in_c, 0).to(tl.float32)
        total += row * tl.load(weight + (k * W + j) * d + c, c < d, 0).to(tl.float32)[None, :]
    total *= tl.sigmoid(total)
    u += (b * tl.num_programs(1) + k) * length * d
    tl.store(u + t[:, None] * d + c[None, :], total, (t < length)[:, None] & in_c)


def forward(x: Tensor, weight: Tensor, bias: Tensor, table: Table) -> Tensor:
    """x (b, p, d), weight (k, d, w), bias (k, d) -> (b, k, l, d) in x's dtype, computed in float32."""
    (b, p, d), (k, length), width = x.shape, table.routes.shape, weight.shape[2]
    x = x if x.stride(2) == 1 else x.contiguous()
    u = torch.empty(b, k, length, d, dtype=x.dtype, device=x.device)
    filters = weight.mT.contiguous(), bias.contiguous()
    grid = triton.cdiv(length, STEPS) * triton.cdiv(d, WIDTH), k, b
    sizes = p, length, d, x.stride(0), x.stride(1)
    if u.numel():
        with torch.cuda.device_of(x):
            _kernel[grid](x, *filters, table.routes, u, *sizes, width, STEPS, WIDTH)
    return u

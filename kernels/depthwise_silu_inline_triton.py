"""A depthwise convolution and SiLU as a Triton kernel that ``torch.compile`` launches like its own; without gradients.

The equation is in ``depthwise_silu_reference``. At small batches the host decides, and an operator costs it several
times what the launch of such a kernel does; large maps take ``depthwise_silu_cuda`` less time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS, CHANNELS = 16, 64  # of a program


@triton.jit
def _kernel(
    x, weight, bias, y, pixels, h, w, d,
    K: tl.constexpr, BIASED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    column, row = p % w, p // w % h
    z = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            down, right = i - K // 2, j - K // 2
            inside = (row + down >= 0) & (row + down < h) & (column + right >= 0) & (column + right < w)
            value = tl.load(x + (p + down * w + right) * d + c, inside & (p < pixels) & (c < d), 0).to(tl.float32)
            z += value * tl.load(weight + c * K * K + i * K + j, c < d, 0).to(tl.float32)
    if BIASED:
        z += tl.load(bias + c, c < d, 0).to(tl.float32)
    tl.store(y + p * d + c, z * tl.sigmoid(z), (p < pixels) & (c < d))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (b, h, w, d), weight (d, 1, k, k), bias (d,) -> (b, h, w, d) in x's dtype."""
    (b, h, w, d), x, weight = x.shape, x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    grid = (triton.cdiv(b * h * w, PIXELS), triton.cdiv(d, CHANNELS))
    shift = weight if bias is None else bias
    sizes = b * h * w, h, w, d
    _kernel[grid](
        x, weight, shift, y, *sizes, K=weight.shape[-1], BIASED=bias is not None, PIXELS=PIXELS, CHANNELS=CHANNELS
    )
    return y

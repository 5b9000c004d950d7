"""The causal convolution along routes in CUDA C++ (``route_conv.cu``): each row of a map is read once for each route.

For inference; where gradients are asked for, ``route_conv`` goes step by step.
"""

from pathlib import Path

import torch
from torch import Tensor

from vmamba.kernels import nvrtc
from vmamba.kernels.backends import other_types
from vmamba.kernels.routes import Table

SOURCE = Path(__file__).with_name("route_conv.cu")
TYPES = {torch.bfloat16: "T_BF16", torch.float16: "T_FP16", torch.float32: "T_FP32"}
STEPS, THREADS, BYTES = 16, 128, 16  # steps of a thread; threads of a block; bytes of a read


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (x) can be filtered on a GPU."""
    return other_types(tensors[:1], tuple(TYPES)) or nvrtc.why_not()


def defines(dtype: torch.dtype, taps: int, vector: int) -> tuple[str, ...]:
    """What the source is compiled with, for x of ``dtype``, filters of ``taps`` and ``vector`` channels in a read."""
    return TYPES[dtype], f"TAPS={taps}", f"VECTOR={vector}", f"STEPS={STEPS}"


def forward(x: Tensor, weight: Tensor, bias: Tensor, table: Table) -> Tensor:
    """x (b, p, d), weight (k, d, w), bias (k, d) -> (b, k, l, d) in x's dtype, computed in float32."""
    (b, p, d), (k, length) = x.shape, table.routes.shape
    if x.stride(2) != 1 or (b > 1 and x.stride(0) != p * x.stride(1)):
        x = x.contiguous()
    u = torch.empty(b, k, length, d, dtype=x.dtype, device=x.device)
    if not u.numel():
        return u
    vector = BYTES // x.element_size()
    while d % vector or x.stride(1) % vector or x.data_ptr() % (vector * x.element_size()):
        vector //= 2
    blocks = -(-b * k * -(-length // STEPS) * (d // vector) // THREADS)
    filters, offsets = weight.mT.float().contiguous(), bias.float().contiguous()
    run = nvrtc.kernel(SOURCE, "forward", defines(x.dtype, weight.shape[2], vector), x.device.index)
    run((blocks, 1), THREADS, x, filters, offsets, table.routes, u, b, k, length, p, d, x.stride(1))
    return u

"""The gated sum of routes in CUDA C++ (``gated_merge.cu``), in one pass over memory.

For inference; where gradients are asked for, ``gated_merge`` goes step by step.
"""

from pathlib import Path

import torch
from torch import Tensor

from vmamba.kernels import nvrtc, stored
from vmamba.kernels.routes import Table

SOURCE = Path(__file__).with_name("gated_merge.cu")
THREADS, WIDE = 128, 8  # of a block; channels of a thread


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (y and z) can be merged on a GPU."""
    return stored.mixed(*(t.dtype for t in tensors)) or nvrtc.why_not()


def defines(y: torch.dtype, z: torch.dtype, out: torch.dtype, vector: int, visits: int) -> tuple[str, ...]:
    """What the source is compiled with, for tensors of these types, a table of ``visits`` and ``vector`` channels."""
    return *stored.defines(Y=y, Z=z, X=out), f"VECTOR={vector}", f"VISITS={visits}"


def forward(y: Tensor, z: Tensor, table: Table, divisor: float, dtype: torch.dtype) -> Tensor:
    """y (b, k, l, d), z (b, p, d) of any strides -> (b, p, d) in ``dtype``, computed in float32."""
    if stored.mixed(y.dtype, z.dtype, dtype):
        return forward(y, z, table, divisor, torch.float32).to(dtype)
    b, pixels, d = z.shape
    if z.stride(2) != 1 or (b > 1 and z.stride(0) != pixels * z.stride(1)):
        z = z.contiguous()
    y, out = y.contiguous(), torch.empty(b, pixels, d, dtype=dtype, device=y.device)
    if not out.numel():
        return out
    vector, stride, visits = WIDE, z.stride(1), len(table.inverse)
    while d % vector or stride % vector or any(t.data_ptr() % (vector * t.element_size()) for t in (y, z)):
        vector //= 2
    run = nvrtc.kernel(SOURCE, "forward", defines(y.dtype, z.dtype, dtype, vector, visits), y.device.index)
    blocks, steps = -(-b * pixels * (d // vector) // THREADS), table.routes.numel()
    run((blocks, 1), THREADS, y, z, table.inverse, out, b, pixels, steps, d, stride, 1.0 / divisor)
    return out

"""The weights of a mixer along routes in CUDA C++ (``route_weights.cu``): one launch, where PyTorch takes eight."""

from pathlib import Path

import torch
from torch import Tensor

from vmamba.kernels import nvrtc, stored
from vmamba.kernels.route_weights_reference import filled

SOURCE = Path(__file__).with_name("route_weights.cu")
THREADS = 128


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (x_proj, dt_proj and A_log) can be laid out on a GPU."""
    types = {t.dtype for t in tensors}
    several = f"it takes parameters of one type, got {', '.join(sorted(map(str, types)))}" if len(types) > 1 else None
    return several or stored.mixed(*types) or nvrtc.why_not()


def forward(x_proj: Tensor, dt_proj: Tensor, A_log: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights (b, k, rank + maps + rank, d) in ``dtype``, and A (k, d, n) in float32."""
    if stored.mixed(x_proj.dtype, dtype):
        weights, A = forward(x_proj, dt_proj, A_log, batch, torch.float32)
        return weights.to(dtype), A
    (k, d, r), n = dt_proj.shape, A_log.shape[2]
    rank, maps = filled(r), filled(2 * n)
    weights = x_proj.new_empty(batch, k, 2 * rank + maps, d, dtype=dtype)
    A = A_log.new_empty(k, d, n, dtype=torch.float32)
    parameters = (t.contiguous() for t in (x_proj, dt_proj, A_log))
    blocks = -(-k * d * (2 * rank + maps + n) // THREADS)
    run = nvrtc.kernel(SOURCE, "forward", stored.defines(P=x_proj.dtype, X=dtype), x_proj.device.index)
    run((blocks, 1), THREADS, *parameters, weights, A, batch, k, d, r, n, rank, maps)
    return weights, A

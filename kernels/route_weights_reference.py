"""The weights of a mixer along routes by PyTorch, for any tensor; their layout is in ``route_weights``."""

import torch
from torch import Tensor


def why_not(*tensors: Tensor) -> str | None:
    """None: any tensor will do."""
    return None


def filled(numbers: int) -> int:
    """The next multiple of 8."""
    return -(-numbers // 8) * 8


def forward(x_proj: Tensor, dt_proj: Tensor, A_log: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights (b, k, rank + maps + rank, d) in ``dtype``, and A (k, d, n) in float32 or wider."""
    (k, d, r), n = dt_proj.shape, A_log.shape[2]
    rank, maps = filled(r), filled(2 * n)
    weights = x_proj.new_zeros(batch, k, 2 * rank + maps, d, dtype=dtype)
    weights[:, :, :r] = x_proj[:, :r]
    weights[:, :, rank : rank + 2 * n] = x_proj[:, r:]
    weights[:, :, rank + maps : rank + maps + r] = dt_proj.mT
    return weights, -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))

"""The gated sum of routes in steps, with gradients, for any tensor; the equation is in ``gated_merge``."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.kernels.routes import Table, merge


def why_not(*tensors: Tensor) -> str | None:
    """None: any tensor will do."""
    return None


def forward(y: Tensor, z: Tensor, table: Table, divisor: float, dtype: torch.dtype) -> Tensor:
    """y (b, k, l, d), z (b, p, d) -> (b, p, d) in ``dtype``: merge, divide, gate."""
    merged = merge(y.to(torch.promote_types(y.dtype, torch.float32)), table)
    mean = merged if divisor == 1 else merged / divisor
    return (mean * F.silu(z)).to(dtype)

"""Sums of rows in PyTorch: y[b, i] = sum over v of x[b, index[v, i]]."""

import torch
from torch import Tensor
from torch.nn import functional as F


def why_not(*tensors: Tensor) -> str | None:
    """None: any tensor will do."""
    return None


def rows(x: Tensor, index: Tensor, padded: bool) -> Tensor:
    """x (b, p, d), index (v, i) -> (b, i, d) in x's dtype, summed in float32 at least; p stands for a zero row."""
    x = F.pad(x, (0, 0, 0, 1)) if padded else x
    y = x.index_select(1, index.reshape(-1)).unflatten(1, index.shape)
    if len(index) == 1:
        return y[:, 0]
    return y.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)

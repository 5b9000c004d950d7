"""The causal convolution along routes in steps, with gradients, for any tensor; the equation is in ``route_conv``."""

from typing import cast

import torch
from torch import Tensor

from vmamba.kernels.causal_conv1d import causal_conv1d
from vmamba.kernels.routes import Table, gather


def why_not(*tensors: Tensor) -> str | None:
    """None: any tensor will do."""
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor, table: Table) -> Tensor:
    """x (b, p, d), weight (k, d, w), bias (k, d) -> (b, k, l, d): gather, then a causal convolution of each route."""
    routes = zip(gather(x, table).unbind(1), weight, bias, strict=True)
    maps = [cast(Tensor, causal_conv1d(u.mT, w, b, activation="silu")).mT for u, w, b in routes]
    return maps[0][:, None] if len(maps) == 1 else torch.stack(maps, 1)

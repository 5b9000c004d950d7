"""The causal convolution along routes in steps, for any tensor: see ``route_conv``."""

from torch import Tensor

from vmamba.kernels.routes import Table


def why_not(*tensors: Tensor) -> str | None:
    """None: any tensor will do."""
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor, table: Table) -> Tensor:
    """x (b, p, d), weight (k, d, w), bias (k, d) -> (b, k, l, d)."""
    from vmamba.kernels.route_conv import filtered

    return filtered(x, weight, bias, table)

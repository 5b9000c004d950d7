"""A causal convolution along each route of a map: what Vim's mixer does before it scans (arXiv:2401.09417).

    u[b, k, t] = silu(bias[k] + sum over j of weight[k, :, j] * x[b, routes[k, t - w + 1 + j]])

Steps before a route's first are zeros, as are padded ones.
"""

from torch import Tensor

from vmamba.kernels import route_conv_reference
from vmamba.kernels.backends import choose, plain
from vmamba.kernels.routes import Table


def route_conv(x: Tensor, weight: Tensor, bias: Tensor, table: Table) -> Tensor:
    """Filter a map along its routes, and apply SiLU.

    Args:
        x: (b, p, d), the map's pixels in image order.
        weight: (k, d, w), the filters of each route; bias: (k, d).
        table: the routes over p pixels (``Scan.table``).

    Returns:
        u, (b, k, l, d), in x's dtype.

    Raises:
        ValueError: shapes do not fit.
    """
    k, d = table.routes.shape[0], x.shape[2]
    if weight.shape[:2] != (k, d) or bias.shape != (k, d):
        got = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"weight and bias must be {(k, d, 'w')} and {(k, d)} for these routes and x, got {got}")
    if plain(x, weight, bias):
        return choose("route_conv", "", x).forward(x, weight, bias, table)
    return route_conv_reference.forward(x, weight, bias, table)  # has gradients

"""What a mixer along routes multiplies with, from its parameters, laid out for matrix products on a GPU (Vim).

    into[b, k] = (rows of x_proj that make delta's factor, filled up with zeros | those of B and C, filled up), by d
    out[b, k]  = dt_proj transposed, filled up likewise, by d;   A = -exp(A_log)

Filled up to multiples of 8 rows, so that all that the products read or write is aligned to 16 bytes: else they are far
slower. Without gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.kernels.backends import choose
from vmamba.kernels.route_weights_reference import filled


class Projections(NamedTuple):
    """Parameters of k scans: x_proj (k, r + 2n, d), dt_proj (k, d, r), A_log (k, d, n)."""

    x_proj: Tensor
    dt_proj: Tensor
    A_log: Tensor


def route_weights(parameters: Projections, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The weights for ``batch`` samples of type ``dtype``.

    Returns:
        into (b k, rank | maps, d) and out (b k, rank, d) in ``dtype``, A (k, d, n) in float32 (float64 for float64);
        ``rank`` and ``maps`` are r and 2n, each filled up to a multiple of 8.
    """
    weights, A = choose("route_weights", "", *parameters).forward(*parameters, batch, dtype)
    rank = filled(parameters.dt_proj.shape[2])
    into, out = weights.flatten(0, 1).split([weights.shape[2] - rank, rank], 1)
    return into, out, A

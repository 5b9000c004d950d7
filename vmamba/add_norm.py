"""The residual stream of a column of blocks, (b, l, c), and its norm, any module; a GPU runs both in one kernel.

The stream of a pyramid's blocks, with stochastic depth and our own norm alone, is in ``vmamba.residual``.
"""

from typing import cast

import torch
from torch import Tensor, nn

from vmamba.kernels.add_norm import Norm, add_norm
from vmamba.kernels.backends import eager, plain
from vmamba.narrow import watched
from vmamba.norm import LayerNorm
from vmamba.precision import autocasts

CENTRED = {nn.RMSNorm: False, nn.LayerNorm: True, LayerNorm: True}  # norms of the last axis -> takes the mean off


def add_then_norm(h: Tensor, r: Tensor | None, norm: nn.Module, *, wide: bool = False) -> tuple[Tensor, Tensor]:
    """r <- r + h (h alone where r is None), x = norm(r).

    Without gradients a GPU does both in one pass over memory, and x comes in the type that the next layer computes in;
    with them, and for norms of other classes, ``norm`` is called.

    Args:
        h: (b, l, c). r: (b, l, c) or None.
        norm: (..., c) -> (..., c), with a ``weight``.
        wide: x stays float32 under autocast, as a network's results should.

    Returns:
        x (b, l, c), and the stream (b, l, c) in float32 or wider.
    """
    stream = (h,) if r is None else (h, r)
    known = _parameters(norm) if eager(*stream) else None
    if known and plain(*stream, *(t for t in known[:2] if t is not None)):
        return add_norm(h, r, known, _result_type(norm, h.device.type, wide))
    r = h.to(torch.promote_types(h.dtype, torch.float32)) if r is None else r + h
    return norm(r.to(cast(Tensor, norm.weight).dtype)), r


def _parameters(norm: nn.Module) -> Norm | None:
    """What ``norm`` computes with; None where it is of another class, or where hooks want to see it called."""
    centred = CENTRED.get(type(norm))
    if centred is None or watched(norm):
        return None
    weight, eps = getattr(norm, "weight", None), cast(float | None, norm.eps)
    if weight is None or weight.ndim != 1 or eps is None:
        return None
    return Norm(weight, getattr(norm, "bias", None), eps, centred)


def _result_type(norm: nn.Module, device: str, wide: bool) -> torch.dtype:
    """The type of the next matrix product; float32 where wide results are asked for."""
    own = cast(Tensor, norm.weight).dtype
    if own == torch.float64 or not autocasts(device):
        return own
    return torch.float32 if wide or getattr(norm, "wide", False) else torch.get_autocast_dtype(device)

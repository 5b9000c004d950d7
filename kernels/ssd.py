"""State-space duality (Mamba-2, arXiv:2405.21060): one decay per head, evaluated chunk by chunk as matrix products.

Two forms of one operator: :func:`ssd` for routes, (b, k, l, m, p), which is what 2D scans produce, and
:func:`chunk_scan` with the arguments of mamba-ssm's ``mamba_chunk_scan_combined``. Equation: see ``ssd_reference``. Any
length, number of states, head size and strides; deterministic; computed in float32, whatever autocast says.

Letters: b batch, k routes (or groups) that share B and C, l steps, m heads of a route, p channels of a head, n states.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.kernels.chunks import CHUNK, exact, outer_scan
from vmamba.kernels.ssd_reference import step_sizes

UNLIMITED = (0.0, torch.inf)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = UNLIMITED,
    initial: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Scan k routes of l steps with m heads of p channels and n states.

    Args:
        x: (b, k, l, m, p), float16, bfloat16, float32 or float64.
        dt: (b, k, l, m), step sizes; positive, unless bias or softplus make them so.
        A: (k, m), negative decay rates.
        B, C: (b, k, l, n).
        D: (k, m), (k, m, p) or None.
        dt_bias: (k, m), added to dt. dt_softplus: apply softplus then. dt_limit: clamp to this range in the end.
        initial: (b, k, m, p, n), the state before the first step; zero if absent.
        chunk: steps per chunk; the result does not depend on it.

    Returns:
        y (b, k, l, m, p) in float32 (float64 for float64 inputs), so that sums over routes lose nothing.

    Raises:
        ValueError: shapes do not fit.
    """
    return _scan(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial, chunk)[0]


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = CHUNK,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = UNLIMITED,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same with the arguments of ``mamba_chunk_scan_combined``: h heads in g groups that share B and C.

    Args:
        x: (b, l, h, p). dt: (b, l, h). A: (h,). B, C: (b, l, g, n), head i uses group i // (h / g).
        chunk_size: steps per chunk; the result does not depend on it.
        D: (h,) or (h, p). dt_bias: (h,).
        z: (b, l, h, p): the result is multiplied by silu(z).
        initial_states: (b, h, p, n), the states before the first step.
        dt_softplus, dt_limit: as in :func:`ssd`.
        return_final_states: also return the states after the last step, (b, h, p, n), in float32 at least.

    Returns:
        y (b, l, h, p) in x's dtype; with ``return_final_states`` the pair (y, final states).

    Raises:
        ValueError: shapes do not fit.
    """
    groups, heads = B.shape[2], x.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} heads do not divide into the {groups} groups of B {tuple(B.shape)}")

    def routes(t: Tensor) -> Tensor:  # (b, l, h, ...) -> (b, g, l, h / g, ...)
        return t.unflatten(2, (groups, -1)).transpose(1, 2)

    A = A.unflatten(0, (groups, -1))
    D, dt_bias = (None if t is None else t.unflatten(0, (groups, -1)) for t in (D, dt_bias))
    initial = None if initial_states is None else initial_states.unflatten(1, (groups, -1))
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    y, final = _scan(routes(x), routes(dt), A, B, C, D, dt_bias, dt_softplus, dt_limit, initial, chunk_size)
    y = y.transpose(1, 2).flatten(2, 3)
    y = (y if z is None else y * F.silu(z.to(y.dtype))).to(x.dtype)
    return (y, final.flatten(1, 2)) if return_final_states else y


def _scan(x, dt, A, B, C, D, bias, softplus, limit, initial, chunk) -> tuple[Tensor, Tensor]:
    """y (b, k, l, m, p) and the state after the last step, (b, k, m, p, n)."""
    _check(x, dt, A, B, C, D, bias, initial, chunk)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (t.to(wide) for t in (x, dt, A, B, C))
    with exact(x.device):
        dt = step_sizes(dt, bias, softplus, tuple(limit))
        inputs, log = (x * dt[..., None])[..., None, :], dt * A[:, None]
        y, final = outer_scan(inputs, log, B[..., None, :], C[..., None, :], initial=initial, chunk=chunk)
    y = y[..., 0, :]
    return y if D is None else y + x * D.to(wide).reshape(*A.shape, -1)[:, None], final


def _check(x, dt, A, B, C, D, bias, initial, chunk) -> None:
    if x.ndim != 5 or not all(x.shape[2:]):
        raise ValueError(f"x must be (b, k, l, m, p) with l, m, p > 0, got {tuple(x.shape)}")
    b, k, length, m, p = x.shape
    n = B.shape[-1]
    allowed = {
        "dt": (dt, [(b, k, length, m)]),
        "A": (A, [(k, m)]),
        "B": (B, [(b, k, length, n)]),
        "C": (C, [(b, k, length, n)]),
        "D": (D, [(k, m), (k, m, p)]),
        "dt_bias": (bias, [(k, m)]),
        "initial": (initial, [(b, k, m, p, n)]),
    }
    for name, (tensor, shapes) in allowed.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            found = f"got {tuple(tensor.shape)} for x (b, k, l, m, p) = {tuple(x.shape)} and {n} states"
            raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, {found}")
    if chunk < 1:
        raise ValueError(f"a chunk must have at least one step, got {chunk}")

"""The delta rule (DeltaNet, arXiv:2406.06484), gated (arXiv:2412.06464): a state that overwrites what it recalls.

Equation: see ``delta_rule_reference``. Within a chunk the written values u depend on each other through a strictly
lower triangular matrix, u + L u = beta (v - decayed S^T k); one triangular solve gives them as u = U - W S (the WY
form), and the state goes from chunk to chunk by S <- M S + N. Any length, any sizes of keys and values, any strides;
deterministic; computed in float32, whatever autocast says.

Letters: l steps, n channels of a key, p channels of a value, c chunks of s steps; leading axes (batch, routes, heads)
are free.
"""

import torch
from torch import Tensor

from vmamba.kernels.checks import check_shapes
from vmamba.kernels.chunks import CHUNK, decays, exact, split


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk: int = CHUNK,
) -> Tensor | tuple[Tensor, Tensor]:
    """Read with queries from a state that keys and values are written to.

    flash-linear-attention's (b, l, h, d) becomes (b, h, l, d) by ``transpose(1, 2)``.

    Args:
        q, k: (..., l, n), float16, bfloat16, float32 or float64; keys should have length 1.
        v: (..., l, p).
        beta: (..., l), how much of a value is overwritten: from 0 to 1, or to 2.
        g: (..., l), logarithm of the decay before each step, at most 0; None for no decay.
        scale: factor of the queries; n ** -0.5 by default.
        initial_state: (..., n, p), the state before the first step; zero if absent.
        return_final_state: also return the state after the last step, (..., n, p).
        chunk: steps per chunk; the result does not depend on it.

    Returns:
        y (..., l, p) in float32 (float64 for float64 inputs); with ``return_final_state`` the pair (y, state).

    Raises:
        ValueError: shapes do not fit.
    """
    _check(q, k, v, beta, g, initial_state, chunk)
    wide = torch.promote_types(v.dtype, torch.float32)
    factor = k.shape[-1] ** -0.5 if scale is None else scale
    log = torch.zeros_like(beta) if g is None else g
    state = initial_state
    state = v.new_zeros(*k.shape[:-2], k.shape[-1], v.shape[-1]) if state is None else state
    q, k, v, beta, log, state = (t.to(wide) for t in (q, k, v, beta, log, state))
    with exact(v.device):
        y, state = _chunked(q * factor, k, v, beta, log, state, chunk)
    return (y, state) if return_final_state else y


def _chunked(q, k, v, beta, log, state, chunk) -> tuple[Tensor, Tensor]:
    axis, length = v.ndim - 2, v.shape[-2]
    q, k, v, beta, log = (split(t, min(chunk, length), axis) for t in (q, k, v, beta, log))  # (..., c, s, ...)
    start, between = decays(log)
    beta, start = beta[..., None], start[..., None]
    lower = (k @ k.mT) * between * beta  # its strictly lower part counts
    written = torch.cat([v, k * start], -1) * beta
    written = torch.linalg.solve_triangular(lower, written, upper=False, unitriangular=True)
    U, W = written.split([v.shape[-1], k.shape[-1]], -1)
    kept = (k * between[..., -1, :, None]).mT  # what the chunk's end has of each key, (..., c, n, s)
    M = start[..., -1:, :] * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - kept @ W
    states = [state]
    for step, added in zip(M.unbind(axis), (kept @ U).unbind(axis), strict=True):
        states.append(step @ states[-1] + added)
    before = torch.stack(states[:-1], axis)  # (..., c, n, p)
    y = (q * start) @ before + ((q @ k.mT) * between) @ (U - W @ before)
    return y.flatten(-3, -2)[..., :length, :], states[-1]


def _check(q, k, v, beta, g, state, chunk) -> None:
    if v.ndim < 2 or k.ndim < 2 or not v.shape[-2]:
        raise ValueError(f"k must be (..., l, n) and v (..., l, p) with l > 0, got {tuple(k.shape)}, {tuple(v.shape)}")
    *lead, length, p = v.shape
    n = k.shape[-1]
    wanted = {
        "k": (k, (*lead, length, n)),
        "q": (q, (*lead, length, n)),
        "beta": (beta, (*lead, length)),
        "g": (g, (*lead, length)),
        "initial_state": (state, (*lead, n, p)),
    }
    check_shapes(wanted, "v (..., l, p)", v)
    if chunk < 1:
        raise ValueError(f"a chunk must have at least one step, got {chunk}")

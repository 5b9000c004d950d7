"""The meaning of the selective scan, in PyTorch, in any precision: what every fast version is tested against.

Mamba (arXiv:2312.00752), equations 2 and 3 with the exponential for A and the Euler step for B::

    delta[t] = softplus(delta[t] + bias)
    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]          h[-1] = 0
    y[t] = (sum_n C[t, n] h[t, n] + D u[t]) silu(z[t])
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64


def why_not(*tensors: Tensor) -> str | None:
    """None: the reference takes every device and floating-point type."""
    return None


def reference(u, delta, A, B, C, D=None, z=None, bias=None, softplus=False):
    """(b, k, l, d) routes -> y (b, k, l, d), last state (b, k, d, n), states before each chunk (b, k, chunks, d, n)."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    delta = delta if bias is None else delta + bias.to(dtype)[:, None]
    delta = F.softplus(delta) if softplus else delta
    state = u.new_zeros(u.shape[0], *A.shape)  # (b, k, d, n)
    ys, states = [], []
    for t in range(u.shape[2]):
        states.append(state)
        step = delta[:, :, t, :, None]  # (b, k, d, 1)
        state = torch.exp(step * A) * state + step * u[:, :, t, :, None] * B[:, :, t, None]
        ys.append((state * C[:, :, t, None]).sum(-1))
    y = torch.stack(ys, 2)
    y = y if D is None else y + u * D.to(dtype)[:, None]
    return y if z is None else y * F.silu(z.to(dtype)), state, torch.stack(states[::CHUNK], 2)


def forward(*args) -> tuple[Tensor, Tensor, Tensor]:
    """y, last state, states before each chunk; the tensors as in :func:`reference`."""
    return reference(*args)


def backward(dy: Tensor, states: Tensor, softplus: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, bias (None where the input is None) by automatic differentiation."""
    present = [t for t in tensors if t is not None]

    def y_of(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        u, delta, A, B, C, D, z, bias = (None if t is None else next(given) for t in tensors)
        return reference(u, delta, A, B, C, D, z, bias, softplus)[0]

    grads = iter(torch.func.vjp(y_of, *present)[1](dy))
    return tuple(None if t is None else next(grads) for t in tensors)

"""The meaning of the fused 2D scan, in PyTorch, in any precision: what every fast version is tested against.

Per route k, with delta, B, C linear in the pixel (VMamba, arXiv:2401.10166, section 4.2), read along the route::

    u, (dt, B, C) = x[routes[k]], projected[routes[k], k]         the number p reads zeros
    delta = softplus(dt_proj[k] dt + bias[k])
    y_k = selective_scan(u, delta, A[k], B, C) + D[k] u           see ``selective_scan_reference``
    y[pixel] = sum over k and the visits of the pixel of y_k
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.kernels import selective_scan_reference as scan


def why_not(*tensors: Tensor) -> str | None:
    """None: the reference takes every device and floating-point type."""
    return None


def reference(x, projected, dt_proj, A, D, bias, routes, inverse):
    """x (b, p, d), projected (b, p, k, r + 2n), dt_proj (k, d, r) -> y (b, p, d), states before each chunk."""
    k, _, n = A.shape
    x, projected = F.pad(x, (0, 0, 0, 1)), F.pad(projected, (0, 0, 0, 0, 0, 1))  # row p is zero
    u = x[:, routes]  # (b, k, l, d)
    each = projected[:, routes, torch.arange(k, device=routes.device)[:, None]]  # (b, k, l, r + 2n)
    dt, B, C = each.split([dt_proj.shape[-1], n, n], -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    delta = dt.to(wide) @ dt_proj.to(wide).mT
    y, _, states = scan.reference(u, delta, A, B, C, D, None, bias, True)
    visits = F.pad(y.flatten(1, 2), (0, 0, 0, 1))[:, inverse]  # (b, v, p, d)
    return visits.sum(1), states


def forward(*args) -> tuple[Tensor, Tensor]:
    """y and the states before each chunk; the arguments as in :func:`reference`."""
    return reference(*args)


def backward(dy: Tensor, states: Tensor, routes: Tensor, inverse: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, projected, dt_proj, A, D, bias by automatic differentiation."""

    def y_of(*leaves: Tensor) -> Tensor:
        x, projected, dt_proj, A, D, bias = leaves
        return reference(x, projected, dt_proj, A, D, bias, routes, inverse)[0]

    grads = torch.func.vjp(y_of, *tensors)[1](dy)
    return tuple(g.contiguous() for g in grads)

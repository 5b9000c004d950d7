"""Fused 2D selective scan: from channels-last maps and a route table to the merged map, without arrays of k * d * l.

The equation is in ``scan2d_reference``. Everything that is a function of one pixel (delta's low-rank factor, B, C) is
in image order, computed by one matrix product; routes only decide in which order pixels are read. The fused kernels
rely on routes that visit no pixel twice and, where they are as long as the map, visit every pixel; others go step by
step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vmamba.kernels import scan2d_cuda
from vmamba.kernels.backends import choose, eager, inlines
from vmamba.kernels.operator import operator
from vmamba.kernels.routes import Table, gather, merge
from vmamba.kernels.selective_scan import route_scan
from vmamba.kernels.selective_scan_reference import CHUNK


def scan2d(
    x: Tensor,
    projected: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    table: Table,
    *,
    log_A: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Scan a map along k routes and sum the routes, pixel by pixel.

    Args:
        x: (b, p, d), the map's p pixels in image order; float16, bfloat16, float32 or float64.
        projected: (b, p, k, r + 2n), for each pixel and route [delta's factor | B | C], in x's dtype.
        dt_proj: (k, d, r), delta = softplus(dt_proj factor + bias).
        A: (k, d, n), real. D, bias: (k, d).
        table: the routes over p pixels (``Scan.table``).
        log_A: A is given as log(-A), as networks learn it; the CUDA C++ kernels then make A themselves.
        backend: ``cuda``, ``triton``, ``cpu``, ``reference`` or None for the best that takes these tensors.

    Returns:
        y, (b, p, d), in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit; RuntimeError: the chosen backend cannot take these tensors.
    """
    _check(x, projected, dt_proj, A, D, bias, table)
    gaps = table.padded and table.routes.shape[1] == x.shape[1]  # as long as the map, yet not through each pixel
    fused, tensors = table.once and not gaps, (x, projected, dt_proj, A, D, bias)
    if fused and not backend and inlines(*tensors):
        from vmamba.kernels import scan2d_triton

        return scan2d_triton.inline(*tensors, table.routes, log_A)
    module = choose("scan2d", backend or "", *tensors) if fused and eager(*tensors) else None
    if log_A and module is not scan2d_cuda:
        A, log_A = -torch.exp(A.to(torch.promote_types(A.dtype, torch.float32))), False
        tensors = (x, projected, dt_proj, A, D, bias)
    if not fused:
        return _composed(*tensors, table, backend)
    if module is not None:
        options = {"log_A": True} if log_A else {}
        if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
            return _Direct.apply(*tensors, *table[:2], module, options)
        if hasattr(module, "values"):  # without the states that a backward would need
            return module.values(*tensors, *table[:2], **options)
        return module.forward(*tensors, *table[:2], **options)[0]
    flat = projected.flatten(2)  # of four axes a compiler would move one
    return torch.ops.vmamba.scan2d(x, flat, *tensors[2:], table.routes, table.inverse, backend or "")[0]


def _composed(x, projected, dt_proj, A, D, bias, table: Table, backend: str | None) -> Tensor:
    """The same in steps, for the tables that the fused kernels do not take: gather, project, scan, merge."""
    k, _, n = A.shape
    slots = torch.arange(k, device=x.device)[:, None]
    each = F.pad(projected, (0, 0, 0, 0, 0, 1))[:, table.routes, slots]  # (b, k, l, r + 2n)
    dt, B, C = each.split([dt_proj.shape[-1], n, n], -1)
    delta = dt @ dt_proj.to(dt.dtype).mT
    y = route_scan(gather(x, table), delta, A, B, C, D, delta_bias=bias, delta_softplus=True, backend=backend)
    return merge(y, table)


def _four_axes(projected: Tensor, x: Tensor, dt_proj: Tensor, A: Tensor) -> Tensor:
    """(b, p, k (r + 2n)) or (b, p, k, r + 2n) -> (b, p, k, r + 2n)"""
    return projected.reshape(*x.shape[:2], A.shape[0], dt_proj.shape[-1] + 2 * A.shape[-1])


@operator("scan2d")
def _forward(
    x: Tensor,
    projected: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    routes: Tensor,
    inverse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = (x, _four_axes(projected, x, dt_proj, A), dt_proj, A, D, bias)
    return choose("scan2d", backend, *tensors).forward(*tensors, routes, inverse)


@operator("scan2d_backward")
def _backward(
    dy: Tensor,
    states: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    routes: Tensor,
    inverse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, _four_axes(projected, x, dt_proj, A), dt_proj, A, D, bias)
    dx, dprojected, *rest = choose("scan2d", backend, *tensors).backward(dy, states, routes, inverse, *tensors)
    return dx, dprojected.view(projected.shape), *rest


@_forward.register_fake
def _(x, projected, dt_proj, A, D, bias, routes, inverse, backend):
    wide = torch.promote_types(x.dtype, torch.float32)
    chunks = (routes.shape[1] + CHUNK - 1) // CHUNK
    k, d, n = A.shape
    return x.new_empty(x.shape, dtype=wide), x.new_empty(x.shape[0], k, chunks, d, n, dtype=wide)


@_backward.register_fake
def _(dy, states, x, projected, dt_proj, A, D, bias, routes, inverse, backend):
    return tuple(t.new_empty(t.shape) for t in (x, projected, dt_proj, A, D, bias))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)


def _gradients(ctx, dy, dstates):
    grads = torch.ops.vmamba.scan2d_backward(dy.contiguous(), *ctx.saved_tensors, ctx.backend)
    return *grads, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher, where nothing but autograd watches."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.module, ctx.options = inputs
        y, states = ctx.module.forward(*tensors, **ctx.options)
        ctx.save_for_backward(states, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        states, *tensors, routes, inverse = ctx.saved_tensors
        grads = ctx.module.backward(dy.contiguous(), states, routes, inverse, *tensors, **ctx.options)
        return *grads, None, None, None, None


def _check(x, projected, dt_proj, A, D, bias, table) -> None:
    b, p, d = x.shape
    k, _, n = A.shape
    r = dt_proj.shape[-1]
    steps, visits = table.routes.shape[1], table.inverse.shape[0]
    wanted = (b, p, k, r + 2 * n), (k, d, r), (k, d, n), (k, d), (k, d), (k, steps), (visits, p)
    given = tuple(t.shape for t in (projected, dt_proj, A, D, bias, table.routes, table.inverse))
    if given != wanted:
        names = "projected", "dt_proj", "A", "D", "bias", "routes", "inverse"
        name, got, shape = next(row for row in zip(names, given, wanted, strict=True) if row[1] != row[2])
        raise ValueError(f"{name} must be {shape} for x (b, p, d) = {(b, p, d)}, got {tuple(got)}")

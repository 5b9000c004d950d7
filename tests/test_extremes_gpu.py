"""Numbers at the edge, on a GPU: long routes, huge steps, fast decay, inputs near float16's limit: ``make test-gpu``.

Errors are ||got - reference|| / ||reference|| against float64 on the same rounded inputs.
"""

import pytest
import torch

from vmamba.kernels import (
    scan2d_cuda,
    scan2d_reference,
    scan2d_triton,
    selective_scan_cuda,
    selective_scan_reference,
    selective_scan_triton,
)
from vmamba.scans import Scan

pytestmark = pytest.mark.gpu
SELECTIVE = [selective_scan_triton, selective_scan_cuda]
FUSED = [(scan2d_triton, torch.float32), (scan2d_cuda, torch.bfloat16), (scan2d_cuda, torch.float16)]


def short(module):
    return str(getattr(module, "__name__", module)).split(".")[-1]


def error(got, right):
    return float((got.double() - right).norm() / right.norm())


@pytest.mark.parametrize("backend", SELECTIVE, ids=short)
def test_65536_steps(backend):
    """The slowest states live for 20000 steps, over which the rounding of their decays adds up."""
    torch.manual_seed(0)
    b, k, length, d, n = 1, 2, 65536, 32, 4
    u, delta, B, C = (torch.randn(b, k, length, size, device="cuda") for size in (d, d, n, n))
    A = -torch.logspace(-3, 3, k * d * n, device="cuda").view(k, d, n)  # from hardly any decay to A = -1e3
    tensors = u, delta * 0.5, A, B, C, None, None, torch.full((k, d), -3.0, device="cuda")
    y = backend.forward(*tensors, True)[0]
    right = selective_scan_reference.forward(*(None if t is None else t.double() for t in tensors), True)[0]
    assert torch.isfinite(y).all() and error(y, right) < 2e-4


@pytest.mark.parametrize("backend", SELECTIVE, ids=short)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_huge_steps_and_inputs(backend, dtype):
    """Delta up to 50, A down to -1e3, u near 6e4."""
    torch.manual_seed(0)
    b, k, length, d, n = 2, 1, 300, 40, 16
    u, B, C = (torch.randn(b, k, length, size, device="cuda") for size in (d, n, n))
    delta = torch.linspace(-50, 50, b * k * length * d, device="cuda").view(b, k, length, d)
    u, delta, B, C = ((6e4 * u / u.abs().max()).to(dtype), delta.to(dtype), B.to(dtype), C.to(dtype))
    A = -torch.logspace(-3, 3, d * n, device="cuda").view(k, d, n)
    tensors = u, delta, A, B, C, None, None, None
    y, _, states = backend.forward(*tensors, True)
    right = selective_scan_reference.forward(*(None if t is None else t.double() for t in tensors), True)[0]
    assert torch.isfinite(y).all() and error(y, right) < 1e-5
    gradients = backend.backward(torch.randn_like(y) * 1e-4, states, True, *tensors)
    assert all(g is None or torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("backend, dtype", FUSED, ids=short)
def test_the_fused_scan(backend, dtype):
    torch.manual_seed(0)
    b, grid, d, r, n = 1, (64, 80), 32, 4, 1
    table = Scan("cross").table(*grid, "cuda")
    k, p = len(table.routes), grid[0] * grid[1]
    x = torch.randn(b, p, d, device="cuda")
    x = (6e4 * x / x.abs().max()).to(dtype)
    projected = torch.randn(b, p, k, r + 2 * n, device="cuda").to(dtype)
    A = -torch.logspace(-3, 3, k * d, device="cuda").view(k, d, n)
    bias = torch.linspace(-20, 50, k * d, device="cuda").view(k, d)
    tensors = x, projected, torch.randn(k, d, r, device="cuda"), A, torch.randn(k, d, device="cuda"), bias
    y, states = backend.forward(*tensors, *table[:2])
    right = scan2d_reference.forward(*(t.double() for t in tensors), *table[:2])[0]
    assert torch.isfinite(y).all() and error(y, right) < (1e-5 if dtype == torch.float32 else 2e-3)
    gradients = backend.backward(torch.randn_like(y) * 1e-4, states, *table[:2], *tensors)
    assert all(torch.isfinite(g).all() for g in gradients)

"""Reading and merging along routes, and the convolution along them, on a GPU: ``make test-gpu``."""

import pytest
import torch

import vmamba
from vmamba.kernels import route_conv_reference, route_conv_triton, routes_reference, routes_triton
from vmamba.kernels.route_conv import route_conv
from vmamba.scans import Scan

pytestmark = pytest.mark.gpu
TYPES = (torch.float16, torch.bfloat16, torch.float32)
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", (*TYPES, torch.float64))
@pytest.mark.parametrize("scan", ["cross", "atrous", "chained", "bidirectional"])
@pytest.mark.parametrize("grid, d", [((1, 1), 1), ((5, 7), 33), ((14, 14), 384), ((3, 40), 600)])
def test_rows(scan, grid, d, dtype):
    table = Scan(scan).table(*grid, "cuda")
    x = torch.randn(2, grid[0] * grid[1], d, device="cuda", dtype=dtype)
    y = torch.randn(2, table.routes.numel(), d, device="cuda", dtype=dtype)
    for rows, index in ((x, table.routes.view(1, -1)), (y, table.inverse)):
        got, right = (m.rows(rows, index, table.padded) for m in (routes_triton, routes_reference))
        assert torch.equal(got, right) or (got - right).norm() < ROUNDING.get(dtype, 1e-12) * right.norm()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scan", ["bidirectional", "atrous", "raster"])
@pytest.mark.parametrize("grid, d, width", [((1, 1), 5, 4), ((5, 7), 33, 4), ((1, 197), 384, 4), ((9, 4), 130, 2)])
def test_route_conv(scan, grid, d, width, dtype):
    table = Scan(scan).table(*grid, "cuda")
    k = len(table.routes)
    x = torch.randn(2, grid[0] * grid[1], d, device="cuda", dtype=dtype)
    weight, bias = torch.randn(k, d, width, device="cuda"), torch.randn(k, d, device="cuda")
    got = route_conv(x, weight, bias, table)
    other = route_conv_triton.forward(x, weight, bias, table)
    assert got.dtype == other.dtype == dtype
    exact = (t.double().cpu() for t in (x, weight, bias))
    right = route_conv_reference.forward(*exact, Scan(scan).table(*grid))
    for y in (got, other):
        assert (y.cpu().double() - right).norm() < ROUNDING[dtype] * right.norm()


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "efficientvmamba_tiny", "msvmamba_nano", "vcmamba_s"])
def test_a_network_equals_itself_on_the_cpu(name):
    torch.manual_seed(0)
    model, image = vmamba.create_model(name).eval(), torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        cpu, gpu = model(image), model.cuda()(image.cuda()).cpu()
    assert (cpu - gpu).norm() < 1e-3 * cpu.norm()

"""The backward of the fused 2D scan for several states on a CUDA GPU, against float64 gradients: ``make test-gpu``.

Every way to share out the work is tried: lanes of a channel, groups of routes, groups of channels of a block.
"""

import pytest
import torch

from vmamba.kernels import scan2d_backward_plan as plans
from vmamba.kernels import scan2d_cuda, scan2d_reference
from vmamba.scans import Scan

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float16: 3e-3, torch.bfloat16: 8e-3}  # as in test_scan2d_gpu
CASES = [  # batch, grid, d, r, n, scan, groups of routes, groups of channels of a block
    (1, (1, 1), 8, 1, 4, "cross", 1, 1),
    (2, (1, 7), 96, 6, 16, "cross", 4, 1),
    (2, (8, 8), 192, 12, 16, "cross", 2, 3),
    (3, (5, 13), 200, 48, 16, "cross", 1, 7),
    (1, (20, 33), 136, 24, 16, "cross", 4, 2),
    (2, (9, 13), 40, 1, 5, "bidirectional", 2, 1),
    (2, (10, 20), 72, 7, 9, "cross", 1, 2),
    (1, (10, 20), 40, 12, 24, "cross", 2, 2),
    (1, (10, 13), 40, 64, 64, "raster", 1, 3),
    (2, (7, 9), 96, 6, 16, "atrous", 2, 2),
    (1, (9, 7), 40, 3, 33, "atrous", 1, 1),
]


def inputs(case, dtype):
    b, grid, d, r, n, scan = case[:6]
    table = Scan(scan).table(grid[0], grid[1], "cuda")
    k, p = len(table.routes), grid[0] * grid[1]
    generator = torch.Generator("cuda").manual_seed(d)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=generator)

    x, projected, dy = normal(b, p, d).to(dtype), normal(b, p, k, r + 2 * n).to(dtype), normal(b, p, d)
    weights = normal(k, d, r) * r**-0.5, -normal(k, d, n).exp(), normal(k, d), normal(k, d) - 2
    return dy, [x, projected, *weights], table[:2]


def gradients(dy, states, table, tensors):
    return scan2d_cuda.backward(dy, states, *table, *tensors)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_however_the_work_is_shared_out(case, dtype, monkeypatch):
    groups, span = case[-2:]

    def chosen(plan, scan, gpu):
        return plans.Blocks(groups, -(-scan.channels // (plan.channels * span)), span)

    monkeypatch.setattr(scan2d_cuda, "spread", chosen)
    dy, tensors, table = inputs(case, dtype)
    exact = [t.double() for t in tensors]
    states = scan2d_reference.forward(*exact, *table)[1]
    expected = scan2d_reference.backward(dy.double(), states, *table, *exact)
    states = states.float().contiguous()
    got, again = (gradients(dy, states, table, tensors) for _ in range(2))
    for one, two, wanted in zip(got, again, expected, strict=True):
        assert (one.double() - wanted).norm() < BOUNDS[dtype] * wanted.norm().clamp(min=1e-30)
        assert torch.equal(one, two), "not deterministic"


def test_tensors_that_start_anywhere():
    dy, tensors, table = inputs((2, (5, 7), 40, 6, 16, "cross"), torch.bfloat16)
    states = scan2d_reference.forward(*[t.double() for t in tensors], *table)[1].float().contiguous()
    expected = gradients(dy, states, table, tensors)
    moved = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (dy, *tensors)]
    assert moved[1].data_ptr() % 16
    got = gradients(moved[0], states, table, moved[1:])
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))

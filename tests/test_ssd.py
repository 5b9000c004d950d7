"""State-space duality: chunked products against the recurrence and against the original."""

import pytest
import torch
from torch.nn import functional as F

from tests import goldens
from vmamba.kernels.ssd import reference, ssd

CASES = [c for c in goldens.load("op_ssd")["cases"] if "initial_states" not in c["inputs"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"])
@pytest.mark.parametrize("form", [reference, ssd])
def test_golden(case, form):
    tensors = {name: t.requires_grad_() for name, t in goldens.named_inputs(case).items()}
    y = grouped(form, case["options"], **tensors)
    assert goldens.compare(y, case["outputs"]["out"]) < 1e-12
    if "grad" in case:
        of = case["grad"]["of"]
        upstream = torch.from_numpy(goldens.make_input(y.shape, case["grad"]["seed"]))
        for name, grad in zip(of, torch.autograd.grad(y, [tensors[n] for n in of], upstream), strict=True):
            assert goldens.compare(grad, case["outputs"][f"d{name}"]) < 1e-11, name


def grouped(form, options, x, dt, A, B, C, D=None, z=None, dt_bias=None):
    """mamba-ssm's arguments (b, l, h, ...) in terms of routes: its g groups are our k routes."""
    g = B.shape[2]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if options.get("dt_softplus") else dt
    dt = dt.clamp(*options["dt_limit"]) if "dt_limit" in options else dt
    if D is not None:
        D = (D if D.ndim == 2 else D[:, None].expand(-1, x.shape[3])).unflatten(0, (g, -1))
    routes = (t.unflatten(2, (g, -1)).transpose(1, 2) for t in (x, dt))
    y = form(*routes, A.unflatten(0, (g, -1)), B.transpose(1, 2), C.transpose(1, 2), D)
    y = y.transpose(1, 2).flatten(2, 3)
    return y if z is None else y * F.silu(z)


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 200])
def test_any_length_equals_the_recurrence(length):
    torch.manual_seed(length)
    x, B, C = torch.randn(2, 3, length, 2, 5), torch.randn(2, 3, length, 7), torch.randn(2, 3, length, 7)
    dt, A, D = torch.rand(2, 3, length, 2), -torch.rand(3, 2) * 8, torch.randn(3, 2, 5)
    exact = reference(*(t.double() for t in (x, dt, A, B, C, D)))
    assert (ssd(x, dt, A, B, C, D) - exact).norm() < 1e-5 * exact.norm()


def test_strong_decay_stays_finite():
    x, B, C = torch.randn(1, 1, 300, 1, 4), torch.randn(1, 1, 300, 4), torch.randn(1, 1, 300, 4)
    A = torch.full((1, 1), -1e3, requires_grad=True)
    y = ssd(x, torch.full((1, 1, 300, 1), 50.0), A, B, C)
    y.sum().backward()
    assert y.isfinite().all() and A.grad.isfinite().all()

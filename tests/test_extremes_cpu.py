"""Numbers at the edge for the operators that are chunked products: 65536 steps, steps up to 50, rates to -1e3, 6e4.

Errors are ||got - right|| / ||right|| against the operator in float64 on the same rounded inputs.
"""

import pytest
import torch
from torch.nn import functional as F

from vmamba.kernels.delta_rule import delta_rule
from vmamba.kernels.mamba3 import mamba3
from vmamba.kernels.ssd import ssd

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUTES = 2


def ssd_inputs(x, delta, rate):
    b, k, length, _ = x.shape
    B, C = torch.randn(2, b, k, length, 4)
    return x[..., None, :], delta[..., None], rate[:, None], B, C


def mamba3_inputs(x, delta, rate):
    b, k, length, _ = x.shape
    q, key = torch.randn(2, b, k, length, 1, 4)
    return q, key, x[..., None, :], rate[:, None] * delta, delta, torch.randn_like(delta), torch.randn(b, k, length, 2)


def delta_rule_inputs(x, delta, rate):
    q, key = torch.randn(2, *x.shape[:3], 4)
    return q, F.normalize(key, dim=-1), x, torch.rand_like(delta), rate[:, None] * delta


OPERATORS = {ssd: ssd_inputs, mamba3: mamba3_inputs, delta_rule: delta_rule_inputs}
operators = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)


def check(operator, tensors, bound=1e-5):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = operator(*leaves)
    with torch.no_grad():
        right = operator(*(t.double() for t in leaves))
    assert y.isfinite().all()
    assert float((y.detach().double() - right).norm() / right.norm()) < bound
    for gradient in torch.autograd.grad(y, leaves, torch.randn_like(y) * 1e-6):
        assert gradient.isfinite().all()


@operators
def test_65536_steps(operator):
    torch.manual_seed(0)
    x, delta = torch.randn(1, ROUTES, 65536, 3), F.softplus(torch.randn(1, ROUTES, 65536) - 3)
    check(operator, OPERATORS[operator](x, delta, torch.tensor([-1e-3, -1e3])))


@operators
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_steps_rates_and_inputs(operator, dtype):
    torch.manual_seed(0)
    x, delta = torch.randn(1, ROUTES, 300, 3), torch.linspace(1e-3, 50, ROUTES * 300).view(1, ROUTES, 300)
    tensors = OPERATORS[operator](6e4 * x / x.abs().max(), delta, torch.tensor([-1e-3, -1e3]))
    check(operator, [t.to(dtype) if t.numel() > ROUTES else t for t in tensors])

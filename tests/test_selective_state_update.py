"""The one-step form of the scan against the original and against the scan itself."""

import pytest
import torch

from tests import goldens
from vmamba.kernels.selective_scan import selective_scan
from vmamba.kernels.selective_state_update import selective_state_update

CASES = goldens.load("op_selective_state_update")["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"])
def test_golden(case):
    tensors = goldens.named_inputs(case)
    y = selective_state_update(**tensors, **case["options"])
    assert goldens.compare(y, case["outputs"]["out"]) < 1e-12
    assert goldens.compare(tensors["state"], case["outputs"]["state"]) < 1e-12


def test_steps_make_up_the_scan():
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    B, C = torch.randn(2, 2, 3, 6, dtype=torch.float64)
    A, D, bias = -torch.rand(5, 3).double(), torch.randn(5).double(), torch.randn(5).double()
    options = dict(delta_bias=bias, delta_softplus=True, return_last_state=True)
    y, last = selective_scan(u, delta, A, B, C, D, z=z, **options)
    state = torch.zeros(2, 5, 3, dtype=torch.float64)
    for t in range(6):
        step = (s[..., t] for s in (u, delta))
        got = selective_state_update(
            state, *step, A, B[..., t], C[..., t], D, z=z[..., t], dt_bias=bias, dt_softplus=True
        )
        torch.testing.assert_close(got, y[..., t])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    x, dt, B, C = (torch.randn(2, n).to(dtype) for n in (5, 5, 3, 3))
    A, start = -torch.rand(5, 3), torch.randn(2, 5, 3)
    states = start.clone(), start.double()
    y = selective_state_update(states[0], x, dt, A, B, C, dt_softplus=True)
    exact = selective_state_update(states[1], *(t.double() for t in (x, dt, A, B, C)), dt_softplus=True)
    assert y.dtype == dtype
    torch.testing.assert_close(states[0].double(), states[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("x", (2, 6), "x must be"), ("B", (2, 3, 4), "B must be|C must be"), ("A", (4,), "A must be")],
)
def test_wrong_shapes_are_named(name, shape, message):
    tensors = {
        "state": torch.zeros(2, 4, 5, 3),
        "x": torch.zeros(2, 4, 5),
        "dt": torch.zeros(2, 4, 5),
        "A": torch.zeros(4, 5, 3),
        "B": torch.zeros(2, 2, 3),
        "C": torch.zeros(2, 2, 3),
    }
    with pytest.raises(ValueError, match=message):
        selective_state_update(**tensors | {name: torch.zeros(shape)})
    groups = {key: torch.zeros(2, 3, 3) for key in ("B", "C")}
    with pytest.raises(ValueError, match="g dividing 4 heads"):
        selective_state_update(**tensors | groups)

"""The delta rule: chunks against the recurrence and against the original. Its mixer: see ``test_mamba2``."""

import pytest
import torch
from torch.nn import functional as F

from tests import goldens
from vmamba.kernels.delta_rule import delta_rule
from vmamba.kernels.delta_rule_reference import reference

CASES = goldens.load("op_delta_rule")["cases"]
NAMES = ("q", "k", "v", "beta", "g")


def chunked(**tensors):
    return delta_rule(**tensors, return_final_state=True, chunk=8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"])
@pytest.mark.parametrize("form", [reference, chunked])
def test_golden(case, form):
    tensors = {name: t.requires_grad_() for name, t in goldens.named_inputs(case).items()}
    time_first = "g" in tensors  # how the original has its gated cases
    moved = {name: t.transpose(1, 2) if time_first and name != "initial_state" else t for name, t in tensors.items()}
    y, state = form(**moved)
    y = y.transpose(1, 2) if time_first else y
    assert goldens.compare(y, case["outputs"]["out"]) < 1e-12
    assert goldens.compare(state, case["outputs"]["final_state"]) < 1e-12
    if "grad" in case:
        of = case["grad"]["of"]
        upstream = torch.from_numpy(goldens.make_input(y.shape, case["grad"]["seed"]))
        for name, grad in zip(of, torch.autograd.grad(y, [tensors[n] for n in of], upstream), strict=True):
            assert goldens.compare(grad, case["outputs"][f"d{name}"]) < 1e-11, name


def inputs(length, *lead, n=5, p=7):
    torch.manual_seed(length)
    q, k = torch.randn(2, *lead, length, n).unbind()
    v, beta, g = torch.randn(*lead, length, p), torch.rand(*lead, length), -torch.rand(*lead, length)
    return q, F.normalize(k, dim=-1), v, beta, g


def with_gradients(form, tensors, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = form(*leaves, **options)
    y = y if isinstance(y, torch.Tensor) else y[0]
    upstream = torch.from_numpy(goldens.make_input(y.shape, 0)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def error(got, expected):
    """Relative to the norm of what is expected, or to one where that is less."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1))


@pytest.mark.parametrize(("length", "lead"), [(1, (2, 3)), (7, ()), (64, (2,)), (65, (2, 1, 3)), (150, (1, 2))])
@pytest.mark.parametrize("gated", [True, False])
def test_any_length_and_axes_equal_the_recurrence(length, lead, gated):
    tensors = inputs(length, *lead)[: 4 + gated]
    expected = with_gradients(reference, [t.double() for t in tensors], scale=0.7)
    for name, got, right in zip(("y", *NAMES), with_gradients(delta_rule, tensors, scale=0.7), expected, strict=False):
        assert got.shape == right.shape
        assert error(got, right) < 5e-6, name


def test_a_state_recalls_the_last_value_written_under_a_key():
    k = F.normalize(torch.randn(1, 4, dtype=torch.float64), dim=-1).expand(90, 4)
    v = torch.randn(90, 3, dtype=torch.float64)
    y = delta_rule(k, k, v, torch.ones(90).double(), scale=1.0)
    torch.testing.assert_close(y, v)


def test_a_sequence_goes_on_from_its_state():
    tensors = [t.double() for t in inputs(140, 2, 3)]
    whole, last = delta_rule(*tensors, return_final_state=True)
    state, parts = None, []
    for part in (slice(0, 1), slice(1, 70), slice(70, 140)):
        y, state = delta_rule(*(t[:, :, part] for t in tensors), initial_state=state, return_final_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state, last)


def test_strong_decay_stays_finite():
    q, k, v, beta, g = inputs(200, 1)
    tensors = with_gradients(delta_rule, (q, k, v, beta, 1e4 * g))
    assert all(t.isfinite().all() for t in tensors)
    alone = q.double() * q.shape[-1] ** -0.5  # everything before a step is forgotten
    expected = (alone * k.double()).sum(-1, keepdim=True) * beta.double()[..., None] * v.double()
    assert error(tensors[0], expected) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    tensors = [t.to(dtype) for t in inputs(70, 2)]
    exact = reference(*(t.double() for t in tensors))[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = delta_rule(*tensors)
    assert y.dtype == torch.float32
    assert error(y, exact) < 2e-6


def test_two_runs_are_equal_to_the_bit_and_strides_do_not_matter():
    tensors = inputs(70, 2, 3)
    odd = [torch.stack([t, t], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 1] for t in tensors]
    first, second, third = (with_gradients(delta_rule, t) for t in (tensors, tensors, odd))
    assert all(map(torch.equal, first, second))
    assert max(map(error, third, (t.double() for t in first))) < 1e-6


@pytest.mark.parametrize(
    ("name", "shape"), [("q", (2, 9, 4)), ("beta", (2, 8)), ("g", (2, 9, 1)), ("initial_state", (2, 7, 5))]
)
def test_wrong_shapes_are_named(name, shape):
    tensors = dict(zip(NAMES, inputs(9, 2), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"{name} must be .* for v .* \(2, 9, 7\), got"):
        delta_rule(**tensors)

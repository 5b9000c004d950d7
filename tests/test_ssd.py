"""State-space duality: chunked products against the recurrence and against the original."""

import pytest
import torch
from torch.nn import functional as F

from tests import goldens
from vmamba.kernels import chunks
from vmamba.kernels.chunks import decays, linear_scan, prefix_sums
from vmamba.kernels.ssd import chunk_scan, ssd
from vmamba.kernels.ssd_reference import reference

CASES = goldens.load("op_ssd")["cases"]
NAMES = ("x", "dt", "A", "B", "C", "D")


def step_by_step(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, **options):
    """The recurrence with the arguments of ``chunk_scan``: mamba-ssm's g groups are our k routes."""
    groups, final = B.shape[2], options.pop("return_final_states", False)
    options.pop("chunk_size")
    routes = (t.unflatten(2, (groups, -1)).transpose(1, 2) for t in (x, dt))
    A, D, bias = (None if t is None else t.unflatten(0, (groups, -1)) for t in (A, D, dt_bias))
    initial = None if initial_states is None else initial_states.unflatten(1, (groups, -1))
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    y, state = reference(*routes, A, B, C, D, dt_bias=bias, initial=initial, **options)
    y = y.transpose(1, 2).flatten(2, 3)
    y = y if z is None else y * F.silu(z)
    return (y, state.flatten(1, 2)) if final else y


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"])
@pytest.mark.parametrize("form", [chunk_scan, step_by_step])
def test_golden(case, form):
    tensors = {name: t.requires_grad_() for name, t in goldens.named_inputs(case).items()}
    y = form(**tensors, **case["options"])
    if case["options"].get("return_final_states"):
        y, final = y
        assert goldens.compare(final, case["outputs"]["final_states"]) < 1e-12
    assert goldens.compare(y, case["outputs"]["out"]) < 1e-12
    if "grad" in case:
        of = case["grad"]["of"]
        upstream = torch.from_numpy(goldens.make_input(y.shape, case["grad"]["seed"]))
        for name, grad in zip(of, torch.autograd.grad(y, [tensors[n] for n in of], upstream), strict=True):
            assert goldens.compare(grad, case["outputs"][f"d{name}"]) < 1e-11, name


def inputs(length, b=2, k=3, m=2, p=5, n=7):
    torch.manual_seed(length)
    x, B, C = torch.randn(b, k, length, m, p), torch.randn(b, k, length, n), torch.randn(b, k, length, n)
    return x, torch.rand(b, k, length, m), -torch.rand(k, m) * 8, B, C, torch.randn(k, m, p)


def error(got, expected):
    got, expected = got.detach(), expected.detach()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def with_gradients(form, tensors, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = form(*leaves, **options)
    y = y if isinstance(y, torch.Tensor) else y[0]
    upstream = torch.from_numpy(goldens.make_input(y.shape, 0)).to(y.dtype)
    return y, *torch.autograd.grad(y, leaves, upstream)


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (7, 64), (63, 64), (64, 64), (65, 64), (200, 64), (150, 2)])
def test_any_length_equals_the_recurrence(length, chunk):
    tensors = inputs(length, b=1, k=2)
    expected = with_gradients(reference, [t.double() for t in tensors])
    for name, got, right in zip(("y", *NAMES), with_gradients(ssd, tensors, chunk=chunk), expected, strict=True):
        assert error(got, right) < 3e-6, name


def test_strong_decay_stays_finite():
    x, B, C = torch.randn(1, 1, 300, 1, 4), torch.randn(1, 1, 300, 4), torch.randn(1, 1, 300, 4)
    A = torch.full((1, 1), -1e3, requires_grad=True)
    y = ssd(x, torch.full((1, 1, 300, 1), 50.0), A, B, C)
    y.sum().backward()
    assert y.isfinite().all() and A.grad.isfinite().all()


def test_weak_decay_after_strong_decay_is_exact():
    log = torch.full((60,), -1e-3)
    log[10] = -3e4
    start, between = decays(log)
    assert start[9] == pytest.approx(torch.exp(torch.tensor(-0.01)).item(), rel=1e-6)
    assert start[10] == between[10, 9] == 0 and between[9, 10] == 0
    assert between[59, 20].item() == pytest.approx(torch.exp(torch.tensor(-0.039)).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_left_is_never_subnormal(dtype):
    """On a CPU the exponential takes 40 times as long for such results, and products with them are slow as well."""
    log = -torch.rand(3, 64, dtype=dtype) * 40
    for got, right in zip(decays(log), decays(log.double()), strict=True):
        assert ((got == 0) | (got >= torch.finfo(dtype).tiny)).all() and (got == 0).any() and (got > 0).any()
        torch.testing.assert_close(got.double(), right, rtol=2e-5, atol=2 * torch.finfo(dtype).tiny)


def test_in_place_it_is_the_same():
    sums = prefix_sums(-torch.rand(2, 9, dtype=torch.float64) * 300).requires_grad_()

    def direct(sums):
        return chunks._Between.apply(sums, sums.dtype)

    torch.testing.assert_close(direct(sums), chunks._between(sums, sums.dtype), rtol=1e-12, atol=0)
    near = (sums.detach() / 300).requires_grad_()
    assert torch.autograd.gradcheck(direct, near) and torch.autograd.gradgradcheck(direct, near)
    broken = torch.tensor([-1.0, torch.nan, -2.0], dtype=torch.float64)
    assert direct(broken)[1, 0].isnan() and direct(broken)[2, 0] == chunks._between(broken, broken.dtype)[2, 0]


def test_strong_decay_keeps_the_gradients_exact():
    """Sums of the decays' gradients along rows and columns all but cancel, so that float32 loses them."""
    x, dt, A, B, C, D = inputs(200, b=1, k=2)
    tensors = x, dt, A * 30, B, C, D
    expected = with_gradients(reference, [t.double() for t in tensors])
    for name, got, right in zip(("y", *NAMES), with_gradients(ssd, tensors), expected, strict=True):
        assert error(got, right) < 3e-6, name


@pytest.mark.parametrize("steps", [1, 64, 65, 5000])
def test_sums_and_scans_of_any_length(steps):
    torch.manual_seed(steps)
    log = -torch.rand(2, steps, dtype=torch.float64)
    torch.testing.assert_close(prefix_sums(log), log.cumsum(-1))
    x, state = torch.randn(2, steps, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    y = linear_scan(log, x)
    for t in range(steps):
        state = log[:, t, None].exp() * state + x[:, t]
        if t in (0, 63, 64, steps - 1):
            torch.testing.assert_close(y[:, t], state)


def test_a_sequence_goes_on_from_its_states():
    x, dt, A, B, C = (t.double() for t in inputs(70, k=1)[:5])
    x, dt, B, C, A = x[:, 0], dt[:, 0], B[:, 0, :, None], C[:, 0, :, None], A[0]
    whole, last = chunk_scan(x, dt, A, B, C, return_final_states=True)
    states, parts = None, []
    for part in (slice(0, 1), slice(1, 66), slice(66, 70)):
        piece = (t[:, part] for t in (x, dt)), (t[:, part] for t in (B, C))
        y, states = chunk_scan(*piece[0], A, *piece[1], initial_states=states, return_final_states=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(states, last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    tensors = [t.to(dtype) for t in inputs(70)]
    exact = reference(*(t.double() for t in tensors))[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = ssd(*tensors)
    assert y.dtype == torch.float32
    assert error(y, exact) < 2e-6


def test_strides_do_not_matter_and_two_runs_are_equal_to_the_bit():
    tensors = inputs(70)
    odd = [torch.stack([t, t], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 1] for t in tensors[:2]]
    first, second, third = (with_gradients(ssd, t) for t in (tensors, tensors, [*odd, *tensors[2:]]))
    assert all(map(torch.equal, first, second))
    assert max(map(error, third, (t.double() for t in first))) < 1e-6


def test_compile_without_graph_breaks_and_export():
    tensors = inputs(70)

    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return ssd(*tensors, dt_softplus=True, dt_limit=(0.01, 1.0))

    eager = with_gradients(Scan(), tensors)
    compiled = with_gradients(torch.compile(Scan(), fullgraph=True, backend="aot_eager"), tensors)
    for one, two in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, two)
    program = torch.export.export(Scan(), tensors, dynamic_shapes=None)
    torch.testing.assert_close(program.module()(*tensors), eager[0])
    assert Scan()(*(t.to("meta") for t in tensors)).shape == eager[0].shape


@pytest.mark.parametrize(
    ("name", "shape"), [("x", (2, 6, 9)), ("dt", (2, 3, 9)), ("A", (3,)), ("C", (2, 3, 9, 8)), ("D", (3, 5))]
)
def test_wrong_shapes_are_named(name, shape):
    tensors = dict(zip(NAMES, inputs(9), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"{name} must be .* got"):
        ssd(**tensors)


def test_groups_must_divide_the_heads():
    x, dt, A, B, C = goldens.named_inputs(CASES[0]).values()
    with pytest.raises(ValueError, match="4 heads do not divide into the 3 groups"):
        chunk_scan(x, dt, A, *(t.repeat(1, 1, 2, 1)[:, :, :3] for t in (B, C)))

"""The fused 2D scan: every backend against the float64 reference, and the reference against its equation written out.

Triton's kernels run in Triton's interpreter, in a process of its own (``TRITON_INTERPRET=1`` would make them the first
choice for every CPU tensor): the last test runs this file there.
"""

import os
import subprocess
import sys

import pytest
import torch

from vmamba.kernels import scan2d_cpu, threads
from vmamba.kernels import scan2d_reference as reference
from vmamba.kernels.backends import use_backend
from vmamba.kernels.scan2d import scan2d
from vmamba.scans import Scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests import interpreter  # noqa: F401

BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu"]
NAMES = ("x", "projected", "dt_proj", "A", "D", "bias")
backends = pytest.mark.parametrize("backend", BACKENDS)
outer = pytest.mark.skipif(INTERPRETED, reason="it has nothing to do with Triton")


def padded(h, w):
    """Even and odd pixels, with zeros at both ends: (2, 2 + half the pixels); no pixel left out."""
    p = h * w
    half = (p + 1) // 2
    routes = torch.full((2, half + 2), p)
    routes[0, :half], routes[1, 1 : 1 + p // 2] = torch.arange(0, p, 2), torch.arange(1, p, 2)
    return routes


def partial(h, w):
    """Routes as long as the map that leave out the last pixel and begin with a zero."""
    return torch.cat([torch.tensor([h * w]), torch.arange(h * w - 1)]).repeat(3, 1)


def twice(h, w):
    """Each route visits each pixel twice."""
    once = torch.arange(h * w)
    return torch.stack([torch.cat([once, once]), torch.cat([once, once.flip(0)])])


def name_of(part):
    return getattr(part, "__name__", str(part))


CASES = [  # batch, grid, d, n, r, scan: few or many tasks, whole and partial blocks and chunks
    (2, (1, 1), 1, 2, 1, "raster"),
    (1, (1, 1), 33, 1, 6, padded),
    (2, (3, 5), 5, 16, 1, "bidirectional"),
    (1, (9, 8), 33, 2, 6, padded),
]
LARGE = [
    (1, (9, 8), 96, 1, 20, "cross"),
    (9, (3, 5), 33, 1, 6, "cross"),
    (2, (2, 2), 5, 2, 6, partial),
    (2, (8, 16), 5, 1, 3, "cross"),
    (1, (23, 17), 5, 2, 6, "cross"),
    (2, (23, 17), 33, 1, 20, partial),
]


def identifier(case):
    return "-".join(map(name_of, case))


cases = pytest.mark.parametrize("case", CASES if INTERPRETED else CASES + LARGE, ids=identifier)


def inputs(case, dtype=torch.float32):
    """Tensors as models have them, parameters in float32 beside half precision; and the routes."""
    b, grid, d, n, r, scan = case
    table = Scan(scan).table(*grid)
    k, p = len(table.routes), grid[0] * grid[1]
    generator, wide = torch.Generator().manual_seed(p + d), torch.promote_types(dtype, torch.float32)

    def normal(*shape, to=wide):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to)

    rates = -normal(k, d, n).exp()
    parameters = normal(k, d, r) * r**-0.5, rates, normal(k, d), normal(k, d) - 2
    return [normal(b, p, d, to=dtype), normal(b, p, k, r + 2 * n, to=dtype), *parameters], table


def outputs_and_gradients(tensors, table, backend):
    """y, states and the six gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, states = torch.ops.vmamba.scan2d(*leaves, table.routes, table.inverse, backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.dtype)
    return [y.detach(), states.detach(), *torch.autograd.grad(y, leaves, upstream)]


def error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def compare(case, dtype, tolerance, backend):
    tensors, table = inputs(case, dtype)
    expected = outputs_and_gradients([t.double() for t in tensors], table, "reference")
    got = outputs_and_gradients(tensors, table, backend)
    for name, one, right in zip(("y", "states", *NAMES), got, expected, strict=True):
        assert one.shape == right.shape, name
        assert one.is_contiguous(), name
        assert error(one, right) < tolerance, name
    wide = torch.promote_types(dtype, torch.float32)
    assert [t.dtype for t in got] == [wide, wide, *(t.dtype for t in tensors)]


@backends
@cases
def test_float32(case, backend):
    compare(case, torch.float32, 1e-5, backend)


if INTERPRETED:  # the CPU's kernels and the reference know no segments

    @pytest.mark.parametrize(
        "case", [(2, (9, 16), 20, 1, 6, "cross"), (1, (11, 12), 9, 3, 2, "atrous")], ids=identifier
    )
    def test_routes_in_segments(case, monkeypatch):
        from vmamba.kernels import scan2d_triton

        monkeypatch.setattr(scan2d_triton, "_cuts", lambda *_: 3)
        tensors, table = inputs(case)
        tensors[3], tensors[5] = tensors[3] / 10, tensors[5] - 2  # so that much of a state outlasts a segment
        expected = outputs_and_gradients([t.double() for t in tensors], table, "reference")
        got = outputs_and_gradients(tensors, table, "triton")
        assert max(map(error, got, expected)) < 1e-5


@outer
@cases
def test_float64(case):
    compare(case, torch.float64, 1e-10, "cpu")


@backends
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=["f16", "bf16"])
def test_half_precision(dtype, tolerance, backend):
    compare((1, (9, 8), 33, 2, 6, "bidirectional"), dtype, tolerance, backend)


@backends
def test_strong_decay_and_large_steps(backend):
    tensors, table = inputs((1, (9, 8), 5, 2, 3, "cross"))
    tensors[2], tensors[3] = tensors[2] * 30, tensors[3] * 100
    expected = outputs_and_gradients([t.double() for t in tensors], table, "reference")
    got = outputs_and_gradients(tensors, table, backend)
    assert max(map(error, got, expected)) < 2e-5


@backends
def test_any_strides(backend):
    plain, table = inputs((2, (3, 5), 9, 2, 6, "bidirectional"))
    odd = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in plain]
    odd[1] = torch.cat([plain[1], plain[1]], 2)[:, :, :2]
    for one, two in zip(*(outputs_and_gradients(tensors, table, backend) for tensors in (plain, odd)), strict=True):
        assert error(two, one) < 1e-6


@backends
@pytest.mark.parametrize("scan", ["cross", padded, partial, twice], ids=name_of)
def test_the_steps_of_the_fused_scan_one_by_one(scan, backend):
    """scan2d, fused or composed, against loops over samples, routes and steps."""
    tensors, table = inputs((2, (2, 3), 3, 2, 2, scan))
    x, projected, dt_proj, A, D, bias = (t.double() for t in tensors)
    expected = torch.zeros_like(x)
    for b in range(2):
        for k, route in enumerate(table.routes.tolist()):
            h = torch.zeros_like(A[k])
            for pixel in route:
                inside = pixel < x.shape[1]
                u = x[b, pixel] if inside else torch.zeros_like(x[b, 0])
                factor, B, C = (projected[b, pixel, k] if inside else 0 * projected[b, 0, k]).split([2, 2, 2])
                delta = torch.log1p(torch.exp(dt_proj[k] @ factor + bias[k]))
                h = torch.exp(delta[:, None] * A[k]) * h + (delta * u)[:, None] * B
                if inside:
                    expected[b, pixel] += h @ C + D[k] * u
    assert table.once == (scan is not twice)
    assert error(scan2d(*tensors, table, backend=backend), expected) < 1e-6
    assert error(reference.forward(*(t.double() for t in tensors), *table[:2])[0], expected) < 1e-12


@backends
def test_composed_gradients_where_a_route_visits_twice(backend):
    tensors, table = inputs((1, (2, 3), 3, 2, 2, twice))
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        results.append(torch.autograd.grad(scan2d(*leaves, table, backend=name).square().sum(), leaves))
    assert max(map(error, *results)) < 1e-5


@pytest.fixture
def all_threads(monkeypatch):
    monkeypatch.setattr(threads, "PIECE", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@outer
@pytest.mark.parametrize("batch", [1, 3, 9])  # with groups of routes, with a task per block, with a task per sample
def test_the_same_bits_on_any_number_of_threads(batch, all_threads):
    tensors, table = inputs((batch, (9, 8), 70, 2, 6, "cross"))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(outputs_and_gradients(tensors, table, "cpu"))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@outer
def test_a_nan_stays_in_its_sample_and_channel():
    tensors, table = inputs((9, (9, 8), 33, 2, 6, "cross"))
    tensors[0][0, 7, 1] = float("nan")
    y, _, dx, dprojected, *_ = outputs_and_gradients(tensors, table, "cpu")
    assert y[0, :, 1].isnan().any() and not y[1:].isnan().any()
    assert not y[0, :, [0, *range(2, 33)]].isnan().any()
    assert not dx[1:].isnan().any() and not dprojected[1:].isnan().any()


@outer
def test_empty_batch():
    tensors, table = inputs((0, (3, 5), 5, 2, 3, "cross"))
    y, states, dx, dprojected, *sums = outputs_and_gradients(tensors, table, "cpu")
    assert y.shape == dx.shape == (0, 15, 5) and states.shape == (0, 4, 1, 5, 2) and not dprojected.numel()
    assert all(t.shape == s.shape and not t.any() for t, s in zip(sums, tensors[2:], strict=True))


@backends
def test_two_runs_are_equal_to_the_bit(backend):
    tensors, table = inputs((2, (3, 5), 9, 2, 6, "bidirectional"))
    first, second = (outputs_and_gradients(tensors, table, backend) for _ in range(2))
    assert all(map(torch.equal, first, second))


@backends
def test_operator_protocol(backend):
    tensors, table = inputs((1, (2, 3), 3, 2, 2, padded))
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.vmamba.scan2d.default, (*leaves, *table[:2], backend))
    plain = [t.detach() for t in tensors]
    dy, states = torch.ops.vmamba.scan2d(*plain, *table[:2], backend)
    arguments = (dy, states, *plain, *table[:2], backend)
    if backend != "reference":  # whose vjp PyTorch 2.11 does not run under these checks
        torch.library.opcheck(torch.ops.vmamba.scan2d_backward.default, arguments)


class Merged(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend, self.scan = backend, Scan("cross")

    def forward(self, *tensors):
        return scan2d(*tensors, self.scan.table(2, 3), backend=self.backend).tanh()


@backends
def test_compile_without_graph_breaks_and_export(backend):
    tensors, _ = inputs((1, (2, 3), 3, 2, 2, "cross"))
    arguments = tuple(t.requires_grad_() for t in tensors)
    module = Merged(backend)
    eager = module(*arguments)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(eager, compiled)
    for one, two in zip(*(torch.autograd.grad(y.sum(), arguments) for y in (eager, compiled)), strict=True):
        assert torch.equal(one, two)
    plain = tuple(t.detach() for t in arguments)
    assert torch.equal(torch.export.export(module, plain).module()(*plain), eager)


def test_meta_device():
    tensors, table = inputs((2, (9, 8), 5, 4, 2, "cross"), torch.bfloat16)
    y, states = torch.ops.vmamba.scan2d(*(t.to("meta") for t in (*tensors, *table[:2])), "")
    assert (y.shape, states.shape) == ((2, 72, 5), (2, 4, 2, 5, 4))
    assert {y.dtype, states.dtype} == {torch.float32}


@outer
def test_the_best_backend_of_the_cpu_is_chosen(monkeypatch):
    tensors, table = inputs(CASES[3])
    calls = []
    forward = scan2d_cpu.forward
    monkeypatch.setattr(scan2d_cpu, "forward", lambda *a: calls.append(1) or forward(*a))
    scan2d(*tensors, table)
    with use_backend("reference"):
        scan2d(*tensors, table)
    assert len(calls) == 1
    tensors[0] = tensors[0].to(torch.complex64)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run here: .* got torch.complex64"):
        scan2d(*tensors, table, backend="cpu")


@pytest.mark.parametrize("name", NAMES[1:])
def test_wrong_shapes_are_named(name):
    tensors, table = inputs((2, (3, 5), 5, 2, 3, "cross"))
    named = dict(zip(NAMES, tensors, strict=True))
    named[name] = torch.cat([named[name], named[name]], 1)
    with pytest.raises(ValueError, match=rf"(projected|{name}) must be .* \(b, p, d\) = \(2, 15, 5\), got "):
        scan2d(*named.values(), table)


def test_a_table_of_another_map_is_refused():
    tensors, _ = inputs((2, (3, 5), 5, 2, 3, "cross"))
    with pytest.raises(ValueError, match=r"inverse must be \(4, 15\) .* got \(4, 16\)"):
        scan2d(*tensors, Scan("cross").table(4, 4))


@outer
def test_triton_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]

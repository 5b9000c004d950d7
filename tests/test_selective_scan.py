"""Selective scan: every backend against the original's figures and against the float64 reference.

Triton's kernels run in Triton's interpreter, in a process of its own (``TRITON_INTERPRET=1`` would make them the first
choice for every CPU tensor): the last test runs this file there.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests import goldens
from vmamba.kernels import selective_scan_reference as reference
from vmamba.kernels.selective_scan import route_scan, selective_scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests import interpreter  # noqa: F401
    from vmamba.kernels import selective_scan_triton as triton

BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu"]
PRECISIONS = [(torch.float32, 1e-5)] if INTERPRETED else [(torch.float32, 1e-5), (torch.float64, 1e-10)]
CASES = goldens.load("op_selective_scan")["cases"]
REAL = [case for case in CASES if "A_imag" not in case["inputs"]]
SIZES = [(1, 1, 1), (7, 4, 5), (63, 16, 3), (64, 4, 9), (65, 1, 17), (130, 4, 8)]  # (l, n, d)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "bias")

backends = pytest.mark.parametrize("backend", BACKENDS)


def route_inputs(length, n, d, dtype=torch.float32, b=2, k=2):
    """Everything that the operator takes, (b, k, l, d); A, D and the bias are float32 beside half precision."""
    torch.manual_seed(length)
    real = torch.promote_types(dtype, torch.float32)
    u, delta, z = torch.randn(3, b, k, length, d).to(dtype).unbind()
    B, C = torch.randn(2, b, k, length, n).to(dtype).unbind()
    A, D, bias = -torch.randn(k, d, n).exp().to(real), torch.randn(k, d).to(real), torch.randn(k, d).to(real) - 2
    return u, delta, A, B, C, D, z, bias


def outputs_and_gradients(tensors, backend, softplus=True):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, last, states = torch.ops.vmamba.selective_scan(*leaves, softplus, backend)
    torch.manual_seed(0)
    upstream = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return y, last, states, *torch.autograd.grad(y, leaves, upstream)


def error(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


@backends
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", REAL, ids=lambda case: case["what"])
def test_golden(case, dtype, tolerance, backend):
    tensors = {name: t.to(dtype).requires_grad_() for name, t in goldens.named_inputs(case).items()}
    y = selective_scan(**tensors, **case["options"], backend=backend)
    if case["options"].get("return_last_state"):
        y, last = y
        assert not last.requires_grad
        assert goldens.compare(last, case["outputs"]["last_state"]) < tolerance
    assert goldens.compare(y, case["outputs"]["out"]) < tolerance
    if "grad" in case:
        of = case["grad"]["of"]
        upstream = torch.from_numpy(goldens.make_input(y.shape, case["grad"]["seed"])).to(dtype)
        for name, gradient in zip(of, torch.autograd.grad(y, [tensors[n] for n in of], upstream), strict=True):
            assert goldens.compare(gradient, case["outputs"][f"d{name}"]) < tolerance, name


@pytest.mark.parametrize("case", [case for case in CASES if case not in REAL], ids=lambda case: case["what"])
def test_complex_rates_are_refused(case):
    tensors = goldens.named_inputs(case)
    tensors["A"] = torch.complex(tensors["A"], tensors.pop("A_imag"))
    with pytest.raises(ValueError, match=r"A must be real, got torch\.complex128"):
        selective_scan(**tensors)


@backends
@pytest.mark.parametrize(("length", "n", "d"), SIZES)
def test_against_float64(length, n, d, backend):
    tensors = route_inputs(length, n, d)
    expected = outputs_and_gradients([t.double() for t in tensors], "reference")
    for name, got, right in zip(
        ("y", "last", "states", *NAMES), outputs_and_gradients(tensors, backend), expected, strict=True
    ):
        assert got.shape == right.shape
        assert error(got, right) < 2e-6, name


@backends
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)], ids=["f16", "bf16"])
def test_half_precision_is_computed_in_float32(dtype, tolerance, backend):
    tensors = route_inputs(70, 2, 5, dtype, b=1)
    got = outputs_and_gradients(tensors, backend)
    expected = outputs_and_gradients([t.double() for t in tensors], "reference")
    assert got[0].dtype == got[1].dtype == got[2].dtype == torch.float32
    assert max(map(error, got[:3], expected[:3])) < 2e-6
    for name, tensor, gradient, right in zip(NAMES, tensors, got[3:], expected[3:], strict=True):
        assert gradient.dtype == tensor.dtype
        assert error(gradient, right) < tolerance, name


@backends
def test_any_strides(backend):
    u, delta, A, B, C, D, z, bias = route_inputs(70, 2, 6)
    plain = [u, delta, A, B[:, :, :1].expand_as(B).contiguous(), C, D, z, bias]
    odd = [
        u.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([delta, delta], -1)[..., :6],
        A.transpose(0, 2).contiguous().transpose(0, 2),
        B[:, :, :1].expand_as(B),
        torch.stack([C, C], -1)[..., 1],
        D.T.contiguous().T,
        z.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.stack([bias, bias], -1)[..., 0],
    ]
    for one, two in zip(outputs_and_gradients(plain, backend), outputs_and_gradients(odd, backend), strict=True):
        assert error(two, one) < 1e-6


@backends
def test_two_runs_are_equal_to_the_bit(backend):
    tensors = route_inputs(70, 2, 9, b=1, k=1)
    first, second = (outputs_and_gradients(tensors, backend) for _ in range(2))
    assert all(map(torch.equal, first, second))


@backends
def test_operator_protocol(backend):
    tensors = route_inputs(5, 2, 3, b=1, k=1)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.vmamba.selective_scan.default, (*leaves, True, backend))
    bare = (*leaves[:5], None, None, None, False, backend)
    torch.library.opcheck(torch.ops.vmamba.selective_scan.default, bare)
    dy, _, states = torch.ops.vmamba.selective_scan(*(t.detach() for t in tensors), True, backend)
    arguments = (dy, states, *(t.detach() for t in tensors), True, backend)
    if backend != "reference":  # which differentiates by torch.func: opcheck cannot look into its tensors
        torch.library.opcheck(torch.ops.vmamba.selective_scan_backward.default, arguments)


class Scan(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, u, delta, A, B, C, D, bias):
        return route_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, backend=self.backend).tanh()


@backends
def test_compile_without_graph_breaks_and_export(backend):
    u, delta, A, B, C, D, _, bias = route_inputs(5, 2, 3, b=1, k=1)
    arguments = tuple(t.requires_grad_() for t in (u, delta, A, B, C, D, bias))
    module = Scan(backend)
    eager = module(*arguments)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(eager, compiled)
    for one, two in zip(*(torch.autograd.grad(y.sum(), arguments) for y in (eager, compiled)), strict=True):
        assert torch.equal(one, two)
    plain = tuple(t.detach() for t in arguments)
    assert torch.equal(torch.export.export(module, plain).module()(*plain), eager)


def test_meta_device():
    u, delta, A, B, C, *_ = (t.to("meta") for t in route_inputs(130, 4, 5, torch.bfloat16))
    y, last, states = torch.ops.vmamba.selective_scan(u, delta, A, B, C, None, None, None, True, "")
    assert (y.shape, last.shape, states.shape) == ((2, 2, 130, 5), (2, 2, 5, 4), (2, 2, 3, 5, 4))
    assert {t.dtype for t in (y, last, states)} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "shape"), [("delta", (2, 4, 9)), ("A", (5, 2)), ("B", (2, 4, 2, 9)), ("D", (5,)), ("z", (2, 6, 8))]
)
def test_wrong_shapes_are_named(name, shape):
    shapes = {"u": (2, 6, 9), "delta": (2, 6, 9), "A": (6, 2), "B": (2, 2, 9), "C": (2, 2, 9)} | {name: shape}
    tensors: dict[str, Any] = {n: torch.zeros(s) for n, s in shapes.items()}
    with pytest.raises(ValueError, match=rf"{name} must be .* for u \(b, d, l\) = \(2, 6, 9\), got "):
        selective_scan(**tensors)


def test_reference_is_the_recurrence_written_out():
    tensors = [t.double() for t in route_inputs(3, 1, 1, b=1, k=1)]
    u, delta, A, B, C, D, z, bias = (t.flatten() for t in tensors)
    h, expected = 0.0, []
    for t in range(3):
        step = torch.log1p(torch.exp(delta[t] + bias))
        h = torch.exp(step * A) * h + step * B[t] * u[t]
        expected.append((C[t] * h + D * u[t]) * z[t] * torch.sigmoid(z[t]))
    torch.testing.assert_close(reference.forward(*tensors, True)[0].flatten(), torch.cat(expected))


if INTERPRETED:

    @pytest.mark.parametrize("segments", [8, 16])  # few programs take 32: see the other tests
    def test_triton_tiles(segments, monkeypatch):
        monkeypatch.setattr(triton, "SEGMENTS", ((float("inf"), segments),))
        tensors = route_inputs(130, 2, 9, torch.float64, b=1)
        expected = outputs_and_gradients(tensors, "reference")
        assert max(map(error, outputs_and_gradients(tensors, "triton"), expected)) < 1e-12

else:

    def test_triton_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
        assert f"{len(REAL) + len(SIZES) + 8} passed" in run.stdout

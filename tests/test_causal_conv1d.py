"""Causal convolution: every backend against the original's figures and the float64 reference; one-step form; operators.

Without a GPU the Triton backend runs in Triton's interpreter, which must be on from a process's start: a test runs
this file again in a process of its own, with TRITON_INTERPRET=1.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from tests import goldens
from vmamba.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from vmamba.kernels.causal_conv1d_reference import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    importlib.import_module("tests.interpreter")
GPU = torch.cuda.is_available()
BACKENDS = ["reference", "cpu"] + ["triton"] * (GPU or INTERPRETED)
CASES = goldens.load("op_causal_conv1d")["cases"]
WHOLE, STEPS = ([c for c in CASES if c["what"].startswith("update") == update] for update in (False, True))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def device(backend):
    return "cuda" if backend == "triton" and GPU else "cpu"


def error(got, expected):
    return float((got.cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def case_of(b, d, length, w, *, initial=True, bias=True, layout=(0, 1, 2)):
    generator = torch.Generator().manual_seed(length * 31 + w)
    shapes = [(b, d, length), (d, w), (d,) if bias else None, (b, d, w - 1) if initial else None]
    x, *rest = (None if s is None else torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    order = [layout.index(i) for i in range(3)]
    return [x.permute(layout).contiguous().permute(order), *rest]


def run(tensors, silu, backend, dtype=torch.float64):
    """y and the gradients of all tensors that are there, under a fixed upstream gradient."""
    leaves = [None if t is None else t.to(device(backend), dtype).requires_grad_() for t in tensors]
    x, weight, bias, initial = leaves
    activation = "silu" if silu else None
    y = causal_conv1d(x, weight, bias, initial_states=initial, activation=activation, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    present = [t for t in leaves if t is not None and t.numel()]
    return y.detach(), *torch.autograd.grad(y, present, upstream.to(y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case["what"])
def test_golden(case, backend, dtype):
    inputs = {n: t.to(device(backend), dtype).requires_grad_() for n, t in goldens.named_inputs(case).items()}
    out = causal_conv1d(**inputs, **case["options"], backend=backend)
    y, final = out if isinstance(out, tuple) else (out, None)
    assert goldens.compare(y, case["outputs"]["out"]) < TOLERANCE[dtype]
    assert (final is None) == ("final_states" not in case["outputs"])
    if final is not None:
        assert goldens.compare(final, case["outputs"]["final_states"]) < TOLERANCE[dtype]
    if "grad" in case:
        upstream = torch.from_numpy(goldens.make_input(y.shape, case["grad"]["seed"])).to(y)
        of = case["grad"]["of"]
        for name, grad in zip(of, torch.autograd.grad(y, [inputs[n] for n in of], upstream), strict=True):
            assert goldens.compare(grad, case["outputs"][f"d{name}"]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case["what"])
def test_golden_update(case):
    options = dict(case["options"])
    if "cache_seqlens" in options:
        options["cache_seqlens"] = torch.tensor(options["cache_seqlens"])
    inputs = goldens.named_inputs(case)
    assert goldens.compare(causal_conv1d_update(**inputs, **options), case["outputs"]["out"]) < 1e-10
    assert goldens.compare(inputs["conv_state"], case["outputs"]["conv_state"]) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize(
    "b, d, length, w", [(1, 1, 1, 1), (2, 5, 1, 4), (3, 7, 2, 7), (1, 33, 300, 3), (2, 67, 65, 2), (1, 3, 257, 9)]
)
def test_odd_shapes(b, d, length, w, initial, backend):
    for layout in ((0, 1, 2), (0, 2, 1), (2, 0, 1)):
        tensors = case_of(b, d, length, w, initial=initial, bias=initial, layout=layout)
        expected = run(tensors, initial, "reference")
        got = run(tensors, initial, backend, torch.float32)
        assert got[0].stride() == tensors[0].stride()
        assert all(error(g, e) < TOLERANCE[torch.float32] for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend):
    tensors = case_of(2, 6, 50, 4)
    expected = run([t.to(dtype).double() for t in tensors], True, "reference")
    got = run(tensors, True, backend, dtype)
    assert {g.dtype for g in got} == {dtype}
    assert all(error(g, e) < TOLERANCE[dtype] for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_that_are_views(backend):
    x, weight, bias, _ = case_of(2, 8, 40, 4)
    views = [x[:, ::2, 3:37:2], weight[::2].flip(1), bias[1::2], x[:1, :4, :3].expand(2, -1, -1)]
    expected = run([v.contiguous() for v in views], True, "reference")
    assert all(error(g, e) < 1e-12 for g, e in zip(run(views, True, backend), expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_inputs_stay_finite(backend):
    tensors = [1e4 * t for t in case_of(1, 4, 20, 3)]
    assert all(torch.isfinite(g).all() for g in run(tensors, True, backend, torch.float32))


def test_final_states_continue_a_sequence():
    x, weight, bias, _ = case_of(2, 6, 23, 4)
    whole = causal_conv1d(x, weight, bias, activation="swish")
    parts, state = [], None
    for piece in x.split([1, 9, 2, 11], 2):
        part, state = causal_conv1d(piece, weight, bias, initial_states=state, return_final_states=True)
        parts.append(torch.nn.functional.silu(part))
    assert error(torch.cat(parts, 2), whole) < 1e-12


@pytest.mark.parametrize("size, ring", [(3, False), (8, False), (3, True), (5, True)])
def test_updates_continue_a_sequence(size, ring):
    x, weight, bias, _ = case_of(2, 6, 23, 4)
    whole = causal_conv1d(x, weight, bias)
    state, before = torch.zeros(2, 6, size, dtype=x.dtype), torch.zeros(2, dtype=torch.long)
    parts = []
    for piece in x.split([1, 9, 2, 11], 2):
        parts.append(causal_conv1d_update(piece, state, weight, bias, cache_seqlens=before if ring else None))
        before = before + piece.shape[2]
    assert error(torch.cat(parts, 2), whole) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_operator(backend):
    x, weight, bias, initial = (t.float().requires_grad_() for t in case_of(2, 5, 9, 3, layout=(0, 2, 1)))
    op = torch.ops.vmamba.causal_conv1d.default
    torch.library.opcheck(op, (x, weight, bias, initial, True, backend))
    torch.library.opcheck(op, (x, weight, None, None, False, backend))
    grad = torch.autograd.gradcheck
    assert grad(
        lambda *t: op(*t, True, backend),
        [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        + [initial.detach().double().requires_grad_()],
    )


class Filter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 3))

    def forward(self, x):
        return causal_conv1d(x, self.weight, activation="silu", return_final_states=True)


def test_compile_export_and_meta():
    x, module = torch.randn(2, 4, 10), Filter()
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    exported = torch.export.export(module, (x,)).module()(x)
    for got in (compiled, exported):
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    compiled[0].sum().backward()
    assert torch.isfinite(module.weight.grad).all()
    y, final = module.to("meta")(x.to("meta"))
    assert y.shape == x.shape and final.shape == (2, 4, 2) and y.is_meta


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3)}, r"x must be \(b, d, l\), got \(2, 3\)"),
        ({"weight": torch.zeros(4, 2)}, r"weight must be \(3, w\)"),
        ({"bias": torch.zeros(2)}, r"bias must be \(3,\)"),
        ({"initial_states": torch.zeros(2, 3, 5)}, r"initial_states must be \(2, 3, 1\), got \(2, 3, 5\)"),
        ({"activation": "relu"}, "unknown activation 'relu'; choose from None, 'silu', 'swish'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**({"x": torch.zeros(2, 3, 4), "weight": torch.zeros(3, 2)} | change))


def test_update_needs_a_state_that_fits():
    with pytest.raises(ValueError, match=r"conv_state must be \(2, 3, '>= 3'\), got \(2, 3, 2\)"):
        causal_conv1d_update(torch.zeros(2, 3), torch.zeros(2, 3, 2), torch.zeros(3, 4))


def test_reference_is_the_written_equation():
    x, weight, bias, initial = case_of(1, 1, 3, 3)
    inputs = [*initial[0, 0].tolist(), *x[0, 0].tolist()]
    taps = weight[0].tolist()
    expected = [float(bias) + sum(w * v for w, v in zip(taps, inputs[t : t + 3], strict=True)) for t in range(3)]
    assert torch.allclose(reference(x, weight, bias, initial)[0, 0], torch.tensor(expected, dtype=torch.float64))


if not (GPU or INTERPRETED):

    def test_triton_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "triton"]
        done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_volumes_fit_into_a_grid_of_blocks():
    """CUDA allows 65535 blocks along all sides of a grid but the first."""
    x = torch.empty(2, 128**3, 64, device="meta").mT
    for layout in (x, x.contiguous()):
        (_, *others), _ = importlib.import_module("vmamba.kernels.causal_conv1d_triton")._tile(layout)
        assert max(others) < 2**16

"""Mamba-3: chunks against the recurrence, operator and mixer against the original. More mixer: ``test_mamba2``."""

import math

import pytest
import torch

from tests import goldens
from vmamba.checkpoint import load_checkpoint
from vmamba.kernels.mamba3 import mamba3, mamba3_siso
from vmamba.kernels.mamba3_reference import reference, rotate
from vmamba.mixers.mamba3 import Mamba3Mixer, rate

CASES = goldens.load("op_mamba3_siso")["cases"]
NAMES = ("q", "k", "v", "log_decay", "dt", "trap", "angles")


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"])
def test_golden(case, chunk):
    tensors = {name: t.requires_grad_() for name, t in goldens.named_inputs(case).items()}
    y, state = mamba3_siso(**tensors, return_state=True, chunk=chunk)
    found = {"out": y, "angle_state": state.angle, "ssm_state": state.ssm, "k_state": state.k[:, :, 0]}
    upstream = torch.from_numpy(goldens.make_input(y.shape, case["grad"]["seed"]))
    of = case["grad"]["of"]
    grads = torch.autograd.grad(y, [tensors[name] for name in of], upstream)
    found |= {f"d{name}": grad for name, grad in zip(of, grads, strict=True)}
    assert found.keys() == case["outputs"].keys()
    for name, got in found.items():
        assert goldens.compare(got, case["outputs"][name]) < 1e-11, name


def test_block_golden():
    golden = goldens.load("op_mamba3_block")
    block = Mamba3Mixer(32, state=16, head_dim=16, scan="raster").double()
    report = load_checkpoint(block, goldens.fill_state(golden))
    assert report.ok and sum(p.numel() for p in block.parameters()) == golden["params"]
    for case in golden["cases"]:
        (x,) = goldens.case_inputs(case)
        assert goldens.compare(block.in_proj(x), case["outputs"]["in_proj"]) < 1e-12
        assert goldens.compare(block(x[:, None])[:, 0], case["outputs"]["out"]) < 1e-12


def inputs(length, r=1, b=2, g=3, n=6, p=5, a=2):
    torch.manual_seed(length)
    q, k = torch.randn(2, b, g, length, r, n).unbind()
    dt = torch.rand(b, g, length)
    log_decay, trap = -torch.rand(b, g, length) * dt, torch.randn(b, g, length)
    return q, k, torch.randn(b, g, length, r, p), log_decay, dt, trap, torch.randn(b, g, length, a)


def with_gradients(form, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = form(*leaves)
    y = y if isinstance(y, torch.Tensor) else y[0]
    upstream = torch.from_numpy(goldens.make_input(y.shape, 0)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def error(got, expected):
    """Relative to the norm of what is expected, or to one where that is less."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1))


@pytest.mark.parametrize(("length", "r"), [(1, 1), (1, 2), (7, 3), (64, 1), (65, 2), (150, 1)])
def test_any_length_and_rank_equal_the_recurrence(length, r):
    tensors = inputs(length, r)
    expected = with_gradients(reference, [t.double() for t in tensors])
    for name, got, right in zip(("y", *NAMES), with_gradients(mamba3, tensors), expected, strict=True):
        assert got.shape == right.shape
        assert error(got, right) < 5e-6, name


@pytest.mark.parametrize("r", [1, 2])
def test_a_sequence_goes_on_from_its_state(r):
    tensors = [t.double() for t in inputs(75, r)]
    whole, last = mamba3(*tensors, return_state=True)
    state, parts = None, []
    for part in (slice(0, 1), slice(1, 70), slice(70, 75)):
        y, state = mamba3(*(t[:, :, part] for t in tensors), state=state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    for got, right in zip(state, last, strict=True):
        torch.testing.assert_close(got, right)


def test_angles_of_long_sequences_stay_exact():
    tensors = inputs(3000, b=1, g=1)
    _, state = mamba3(*tensors[:-1], tensors[-1].abs(), return_state=True)
    turned = (math.pi * tensors[-1].abs().double().tanh() * tensors[4].double()[..., None]).sum(2)
    assert turned.min() > 1000
    away = (state.angle - turned + math.pi) % (2 * math.pi) - math.pi
    assert away.abs().max() < 2e-6


def test_rotation():
    x = torch.arange(1.0, 6.0)
    torch.testing.assert_close(rotate(x, torch.tensor([math.pi / 2])), torch.tensor([-2.0, 1.0, 3.0, 4.0, 5.0]))
    angle = torch.rand(2)
    torch.testing.assert_close(rotate(rotate(x, angle), -angle), x)


def test_half_precision_is_computed_in_float32():
    tensors = [t.bfloat16() for t in inputs(70, 2)]
    exact = reference(*(t.double() for t in tensors))[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = mamba3(*tensors)
    assert y.dtype == torch.float32
    assert error(y, exact) < 3e-6


def test_streams_that_are_switched_off_leave_the_block_with_one_input():
    torch.manual_seed(0)
    one, two = Mamba3Mixer(16, state=4, head_dim=8).double(), Mamba3Mixer(16, state=4, head_dim=8, rank=2).double()
    (z, x), rest = one.in_proj.weight.split([32, 32, 4 * 21])[:2], one.in_proj.weight[64:].unflatten(0, (4, 21))
    B, C, others = rest.split([4, 4, 13], 1)
    with torch.no_grad():
        extra = torch.randn_like(B)
        two.in_proj.weight.copy_(torch.cat([z, x, torch.cat([B, extra, C, extra, others], 1).flatten(0, 1)]))
        two.out_proj.weight.copy_(one.out_proj.weight)
        two.dt_bias.copy_(one.dt_bias)
        for name in ("mimo_x", "mimo_z", "mimo_o"):
            getattr(two, name).copy_(torch.tensor([1.0, 0.0])[:, None].expand(4, 2, 8))
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(two(x), one(x))


def test_rate_is_smooth_and_negative():
    a = torch.tensor([-1e6, -1.0, 0.0, 1.0, 9.0], dtype=torch.float64, requires_grad=True)
    assert rate(a).tolist() == [-1e-4, -0.5, -1.0, -2.0, -10.0]
    (slope,) = torch.autograd.grad(rate(a).sum(), a)
    assert slope.tolist() == [0.0, -0.25, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("name", "shape"), [("v", (2, 9, 5)), ("q", (2, 3, 9, 2, 6)), ("dt", (2, 9, 3)), ("angles", (2, 3, 9, 4))]
)
def test_wrong_shapes_are_named(name, shape):
    tensors = dict(zip(NAMES, inputs(9), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"{name} must be .* got"):
        mamba3(**tensors)


def test_groups_must_divide_the_heads():
    tensors = goldens.named_inputs(CASES[0])
    tensors |= {name: tensors[name][:, :, :1].repeat(1, 1, 3, 1) for name in ("Q", "K")}
    with pytest.raises(ValueError, match=r"4 heads .* do not divide into the 3 groups"):
        mamba3_siso(**tensors)

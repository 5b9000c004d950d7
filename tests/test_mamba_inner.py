"""Mamba between its projections: the values and gradients of its steps, and less that is kept."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from vmamba.kernels.causal_conv1d import causal_conv1d
from vmamba.kernels.mamba_inner import Mamba, mamba_inner
from vmamba.kernels.selective_scan import selective_scan
from vmamba.mixers.bimamba import BiMamba

SIZES = [(2, 1, 4, 1, 3), (1, 7, 5, 2, 4), (2, 70, 8, 3, 16)]  # b, l, d, r, n


def tensors(b, length, d, r, n, dtype=torch.float64, device="cpu"):
    """h and parameters."""
    torch.manual_seed(length)
    shapes = (b, length, 6), (2 * d, 6), (d, 4), (d,), (r + 2 * n, d), (d, r), (d, n), (d,), (d,)
    drawn = [0.7 * torch.randn(s, dtype=torch.float64) for s in shapes]
    return [t.to(device, dtype).requires_grad_() for t in drawn]


def fused(h, *parameters):
    return mamba_inner(h, Mamba(*parameters))


def steps(h, in_proj, weight, shift, x_proj, dt_proj, A_log, D, bias, backend="reference"):
    x, z = (h @ in_proj.T).chunk(2, -1)
    u = cast(Tensor, causal_conv1d(x.mT, weight, shift, activation="silu", backend="reference")).mT
    dt, B, C = (u @ x_proj.T).split([dt_proj.shape[1], *(A_log.shape[1],) * 2], -1)
    delta = (dt @ dt_proj.T).mT
    y: Any = selective_scan(
        u.mT, delta, -A_log.exp(), B.mT, C.mT, D, z=z.mT, delta_bias=bias, delta_softplus=True, backend=backend
    )
    return y.mT


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_are_those_of_the_steps(sizes):
    own, other = tensors(*sizes), tensors(*sizes)
    y, expected = fused(*own), steps(*other)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(y)
    grads = torch.autograd.grad((y * weights).sum(), own)
    for g, e in zip(grads, torch.autograd.grad((expected * weights).sum(), other), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-8)


def test_gradients_are_those_of_differences():
    assert torch.autograd.gradcheck(fused, tensors(1, 5, 3, 1, 2))


def kept(function, *inputs):
    """Numbers that are kept for the backward, beside the inputs."""
    found = {}

    def keep(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.itemsize
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(*inputs)
    return sum(n for place, n in found.items() if place not in {t.untyped_storage().data_ptr() for t in inputs})


def test_only_states_are_kept():
    b, length, d, _, n = sizes = (2, 128, 8, 3, 16)
    assert kept(fused, *tensors(*sizes)) == b * length // 64 * d * n < kept(steps, *tensors(*sizes)) / 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (3, 1031, 64, 2, 16), (2, 2600, 32, 2, 16)], ids=str)
def test_a_gpu_computes_the_same(sizes, dtype):
    own, other = tensors(*sizes, dtype=dtype, device="cuda"), tensors(*sizes, device="cuda")
    y, expected = fused(*own), steps(*other, backend="triton")
    bound = 1e-4 if dtype == torch.float32 else 1e-9
    assert (y.double() - expected).norm() <= bound * expected.norm()
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((y * weights.to(y)).sum(), own)
    for g, e in zip(grads, torch.autograd.grad((expected * weights).sum(), other), strict=True):
        assert (g.double() - e).norm() <= bound * e.norm()


@pytest.mark.gpu
def test_mamba_trains_by_it_on_a_gpu():
    """The mixer gives the same in training, where it is used, as without gradients, where it is not."""
    torch.manual_seed(0)
    mixer, x = BiMamba(32, scan="raster").cuda(), torch.randn(2, 9, 11, 32, device="cuda")
    y = mixer(x)
    assert "_Inner" in str(_functions(y.grad_fn))
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), y, rtol=1e-4, atol=1e-5)
    with torch.autocast("cuda", torch.bfloat16):
        assert "_Inner" not in str(_functions(mixer(x).grad_fn))


def _functions(node):
    return [node, *(f for after, _ in node.next_functions if after is not None for f in _functions(after))]

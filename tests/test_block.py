"""The residual block's stochastic depth: what timm's DropPath does, in one pass where a GPU trains."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from vmamba import residual
from vmamba.narrow import watched
from vmamba.residual import add_branch


def both(x, branch, drop_path):
    """(values and gradients) of ``add_branch`` and of timm's module, for the same random numbers."""
    found = []
    for function in (lambda: add_branch(x, branch, drop_path), lambda: x + drop_path(branch)):
        torch.manual_seed(5)
        y = function()
        upstream = torch.ones_like(y).cumsum(-1)
        found.append([y.detach(), *torch.autograd.grad(y, (x, branch), upstream)])
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(
    "wide, narrow", [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_gpu_same_as_timm(wide, narrow, scale):
    x = torch.randn(9, 3, 5, 16, device="cuda", dtype=wide, requires_grad=True)
    branch = torch.randn(9, 3, 5, 16, device="cuda", dtype=narrow, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        ours, theirs = both(x, branch, DropPath(0.4, scale))
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == two.dtype
        assert torch.allclose(one.float(), two.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("probability", [0.4, 1.0])
def test_product(probability):
    x, branch = (torch.randn(6, 2, 3, 4, requires_grad=True) for _ in range(2))
    kept = torch.tensor([0.0, 1, 0, 2, 1, 1])[:, None, None, None] * probability
    y = residual._AddProduct.apply(x, branch, kept)
    assert torch.equal(y, torch.addcmul(x, branch, kept))
    assert torch.autograd.gradcheck(residual._AddProduct.apply, (x.double(), branch.double(), kept.double()))


def test_elsewhere_it_is_timms():
    x, branch = (torch.randn(7, 2, 3, 4, requires_grad=True) for _ in range(2))
    for drop_path in (DropPath(0.5), DropPath(0.5).eval(), nn.Identity()):
        ours, theirs = both(x, branch, drop_path)
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_watched(hook):
    modules = nn.Identity(), nn.SiLU()
    assert not watched(*modules)
    handle = getattr(modules[1], hook)(lambda *_: None)
    assert watched(*modules)
    handle.remove()
    assert not watched(*modules)

"""Adding a branch and normalising the stream in one step: the operator, and the blocks that use it."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn

import vmamba
from vmamba import block
from vmamba.block import Block, run_blocks
from vmamba.kernels import residual_norm_reference as reference
from vmamba.kernels.residual_norm import residual_norm
from vmamba.mixers.ss2d import SS2D
from vmamba.norm import LayerNorm
from vmamba.residual import add_branch_then_norm

CASES = [("branch", "factor"), ("branch",), ()]


def tensors(shape, has, dtype=torch.float64, narrow=torch.float64, device="cpu"):
    torch.manual_seed(shape[-1])
    c = shape[-1]
    x, branch = torch.randn(shape) * 3 + 1, torch.randn(shape)
    factor = torch.tensor([0.0, 2, 1, 1.25])[torch.arange(shape[0]) % 4]
    every = x.to(dtype), branch.to(narrow), factor.to(narrow), torch.randn(c).to(dtype), torch.randn(c).to(dtype)
    x, branch, factor, weight, bias = (t.to(device) for t in every)
    branch = branch.requires_grad_() if "branch" in has else None
    return (
        x.requires_grad_(),
        branch,
        factor if "factor" in has else None,
        weight.requires_grad_(),
        bias.requires_grad_(),
    )


def results(function, arguments, dtype):
    """y, the stream and all gradients, of both."""
    y, stream = function(*arguments, eps=1e-5, dtype=dtype)
    leaves = [t for t in arguments if t is not None and t.requires_grad]
    seed = torch.Generator().manual_seed(0)
    loss = (y.double() * torch.randn(y.shape, generator=seed, dtype=torch.float64).to(y.device)).sum()
    if arguments[1] is not None:
        loss = loss + (stream.double() * torch.randn(y.shape, generator=seed, dtype=torch.float64).to(y.device)).sum()
    return [y.detach(), stream.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("has", CASES, ids=str)
def test_own_gradients_are_those_of_autograd(has):
    arguments = tensors((3, 4, 5, 7), has)
    expected = results(reference.forward, arguments, torch.float64)
    for function in (residual_norm, torch.compile(residual_norm, fullgraph=True, backend="aot_eager")):
        got = results(function, arguments, torch.float64)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("has", CASES, ids=str)
def test_opcheck(has):
    arguments = tensors((2, 3, 8), has, torch.float32, torch.bfloat16)
    x, branch, factor, weight, bias = (t if t is None else t.detach() for t in arguments)
    arguments = x, branch, factor, weight, bias, 1e-5, torch.bfloat16, ""
    torch.library.opcheck(torch.ops.vmamba.residual_norm.default, arguments)
    added = None if branch is None else branch.dtype
    gradients = x.bfloat16(), None if branch is None else x, x, factor, weight, 1e-5, added, ""
    torch.library.opcheck(torch.ops.vmamba.residual_norm_backward.default, gradients)


def test_wrong_shapes_are_told():
    x, _, _, weight, bias = tensors((2, 3, 8), ())
    for branch, factor in ((x[:1], None), (x, torch.ones(3))):
        with pytest.raises(ValueError, match=r"must be \(b, ..., c\)"):
            residual_norm(x, branch, factor, weight, bias, eps=1e-5, dtype=x.dtype)


def test_unused_norm():
    arguments = tensors((2, 3, 8), ("branch",))
    residual_norm(*arguments, eps=1e-5, dtype=torch.float64)[1].sum().backward()
    assert torch.equal(arguments[0].grad, torch.ones(2, 3, 8)) and not arguments[3].grad.any()


def blocks(count=3, **options):
    torch.manual_seed(0)
    mixer = lambda dim, **dd: SS2D(dim, state=1, expand=1.0, conv_bias=False, gate=None, **dd)  # noqa: E731
    return nn.Sequential(*(Block(16, mixer=mixer, **options) for _ in range(count)))


@pytest.mark.parametrize("options", [{}, {"mlp_ratio": 0.0}, {"layer_scale": 0.5}, {"drop_path": 0.4}], ids=str)
def test_blocks_in_a_row(options):
    model, x = blocks(**options), torch.randn(5, 3, 4, 16)
    outcomes = []
    for function in (lambda: run_blocks(model, x), lambda: model(x)):
        torch.manual_seed(2)
        y = function()
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), [*model.parameters()])])
    assert all(map(torch.equal, *outcomes))


def test_pruned_blocks_and_empty_stages():
    model, x = blocks(), torch.randn(2, 3, 4, 16)
    assert run_blocks(nn.Sequential(), x) is x
    model[1].norm1, model[0].norm2 = nn.Identity(), nn.Identity()
    assert torch.equal(run_blocks(model, x), model(x))
    mixed = nn.Sequential(model[0], nn.Identity(), model[2])
    assert torch.equal(run_blocks(mixed, x), mixed(x))


def test_hooks_of_a_block_are_run():
    model, seen = blocks(), []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    run_blocks(model, torch.randn(2, 3, 4, 16))
    assert seen == [1]


def test_a_compiled_block_is_called(monkeypatch):
    model, seen = blocks(), []
    monkeypatch.setattr(model[1], "_compiled_call_impl", lambda x: seen.append(1) or x)
    run_blocks(model, torch.randn(2, 3, 4, 16))
    assert seen == [1]


class Wrapped(Block):
    """Stands for blocks that something else has taken over, as FSDP does: their weights are there in a call alone."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_wrapped_block_is_called():
    model, x = blocks(), torch.randn(2, 3, 4, 16)
    model[1].__class__ = Wrapped
    assert torch.equal(run_blocks(model, x), model[2](2 * Block.forward(model[1], model[0](x))))


def test_on_the_cpu_it_is_pytorchs_own():
    x, branch, norm = torch.randn(2, 3, 8), torch.randn(2, 3, 8), LayerNorm(8)
    stream, y = add_branch_then_norm(x, branch, nn.Identity(), norm)
    assert torch.equal(stream, x + branch) and torch.equal(y, norm(x + branch))
    assert add_branch_then_norm(x, branch, nn.Identity(), None)[1].equal(x + branch)


def error(got, right):
    return float((got.double() - right.double()).norm() / right.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("has", CASES, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 5, 96), (2, 1, 7), (4, 130, 33), (4, 768), (5, 8191), (128, 56, 56, 96)], ids=str
)
@pytest.mark.parametrize("wide, narrow", [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)])
def test_gpu_values_and_gradients(shape, has, wide, narrow):
    arguments = tensors(shape, has, wide, narrow, "cuda")
    got = results(residual_norm, arguments, narrow)
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in arguments]
    right = results(reference.forward, exact, torch.float64)
    bound = 4e-6 if narrow == torch.float32 else 5e-3
    assert max(map(error, got, right)) < bound
    again = results(residual_norm, arguments, narrow)
    assert all(map(torch.equal, got, again))


@pytest.mark.gpu
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_gpu_blocks_in_a_row(drop, monkeypatch):
    model, x = blocks(drop_path=drop).cuda(), torch.randn(5, 3, 4, 16, device="cuda")
    outcomes = []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(block, "add_branch_then_norm", apart)
        torch.manual_seed(2)
        with torch.autocast("cuda", torch.bfloat16):
            y = run_blocks(model, x)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), [*model.parameters()])])
    assert max(map(error, *outcomes)) < 2e-2


def apart(x, branch, drop_path, norm):
    stream = x + drop_path(branch)
    return stream, stream if norm is None else norm(stream)


@pytest.mark.gpu
@pytest.mark.parametrize("train", [True, False])
def test_gpu_compiled(train):
    torch.manual_seed(0)
    options = {"depths": (1, 1), "dim": 32, "drop_path_rate": 0}
    model, x = vmamba.create_model("vmamba_tiny_s1l8", **options).cuda().train(train), torch.randn(4, 3, 64, 64).cuda()
    outcomes = []
    for function in (model, torch.compile(model, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(train):
            y = function(x)
        grads = torch.autograd.grad(y.float().square().mean(), [*model.parameters()]) if train else ()
        outcomes.append([y.detach(), *grads])
    assert max(map(error, *outcomes)) < 3e-2


def test_drop_path_of_all_samples():
    x, branch = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    stream, _ = add_branch_then_norm(x, branch, DropPath(1.0).train(), LayerNorm(8))
    assert torch.equal(stream, x)

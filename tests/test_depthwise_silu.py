"""The depthwise convolution with SiLU: its reference, its registration, and where mixers use it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vmamba.block import Conv2d
from vmamba.kernels import depthwise_silu_cuda, depthwise_silu_reference
from vmamba.kernels.depthwise_silu import depthwise_silu
from vmamba.mixers import gated
from vmamba.mixers.ss2d import SS2D

SIZES = [((2, 7, 9, 24), 3), ((1, 1, 1, 8), 3), ((3, 5, 2, 40), 5), ((1, 4, 13, 200), 3)]


def tensors(shape, taps, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(shape[-1])
    sizes = shape, (shape[-1], 1, taps, taps), shape[-1:]
    x, weight, bias = (torch.randn(size, generator=generator).to(device).requires_grad_() for size in sizes)
    return x.detach().to(dtype).requires_grad_(), weight, bias


def values_and_gradients(function, leaves):
    y = function(*leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def by_pytorch(x, weight, bias):
    return F.silu(
        F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    ).permute(0, 2, 3, 1)


def errors(got, right):
    return [float((one.double() - two).norm() / two.norm()) for one, two in zip(got, right, strict=True)]


@pytest.mark.parametrize("shape, taps", [*SIZES[:2], ((2, 5, 4, 3), 7)], ids=str)
def test_reference(shape, taps):
    leaves = tensors(shape, taps)
    right = values_and_gradients(by_pytorch, [t.detach().double().requires_grad_() for t in leaves])
    assert max(errors(values_and_gradients(depthwise_silu, leaves), right)) < 1e-5


def test_without_a_bias():
    x, weight, _ = tensors((2, 4, 3, 8), 3)
    got = values_and_gradients(depthwise_silu, [x, weight])
    right = values_and_gradients(lambda *t: by_pytorch(*t, None), [x, weight])
    assert max(errors(got, right)) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_operator(bias):
    x, weight, shift = tensors((2, 4, 3, 8), 3)
    torch.library.opcheck(torch.ops.vmamba.depthwise_silu.default, (x, weight, shift if bias else None, ""))


def test_wrong_shapes_are_named():
    x, weight, bias = tensors((1, 2, 2, 8), 3)
    for wrong in (
        (x[..., :4], weight, bias),
        (x, weight[..., 1:, 1:], bias),
        (x, weight, bias[1:]),
        (x[0], weight, bias),
    ):
        with pytest.raises(
            ValueError, match=r"must be \(b, h, w, d\), \(d, 1, k, k\) with an odd k, and \(d,\), got x"
        ):
            depthwise_silu(*wrong)


@pytest.fixture
def everywhere(monkeypatch):
    """Mixers use the operator on every device; the list of its calls' shapes."""
    calls = []

    def count(*arguments):
        calls.append(arguments[0].shape)
        return depthwise_silu(*arguments)

    monkeypatch.setattr(gated, "fused", lambda x, weight: True)
    monkeypatch.setattr(gated, "depthwise_silu", count)
    return calls


@torch.no_grad()
def test_in_a_mixer(everywhere, monkeypatch):
    mixer, x = SS2D(8, state=1), torch.randn(2, 5, 4, 8)
    one = mixer(x)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x)
    assert len(everywhere) >= 2
    with torch.enable_grad():
        assert torch.allclose(mixer(x), one, atol=1e-5)
    assert len(everywhere) == 2, "with gradients, PyTorch's own convolution is faster"
    monkeypatch.undo()
    assert all(torch.allclose(y, mixer(x), atol=1e-5) for y in (one, compiled))


@pytest.mark.parametrize(
    "change",
    [
        lambda mixer: setattr(mixer, "act", nn.GELU()),
        lambda mixer: setattr(mixer, "conv", nn.Identity()),
        lambda mixer: setattr(mixer, "conv", Conv2d(16, 16, 3, padding=1, groups=2)),
        lambda mixer: setattr(mixer, "conv", Conv2d(16, 16, 3, padding=2, groups=16, dilation=2)),
        lambda mixer: setattr(mixer, "conv", Conv2d(16, 16, 3, padding=1, groups=16, padding_mode="circular")),
        lambda mixer: mixer.conv.register_forward_hook(lambda *_: None),
        lambda mixer: mixer.act.register_forward_pre_hook(lambda *_: None),
    ],
)
@torch.no_grad()
def test_other_modules_are_called_themselves(everywhere, change):
    mixer = SS2D(8, state=1)
    mixer(torch.randn(1, 3, 3, 8))
    assert everywhere == [(1, 3, 3, 16)]
    change(mixer)
    mixer(torch.randn(1, 3, 3, 8))
    assert len(everywhere) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape, taps", [*SIZES, ((128, 14, 14, 384), 3), ((1, 56, 56, 96), 3)], ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_gpu_values_and_gradients(shape, taps, dtype, bound):
    leaves = tensors(shape, taps, dtype, "cuda")
    assert depthwise_silu_cuda.why_not(*leaves) is None
    exact = [t.detach().double().requires_grad_() for t in leaves]
    right = values_and_gradients(lambda *t: depthwise_silu(*t, backend="reference"), exact)
    first, second = (values_and_gradients(lambda *t: depthwise_silu(*t, backend="cuda"), leaves) for _ in range(2))
    assert max(errors(first, right)) < bound
    assert all(map(torch.equal, first, second)), "not deterministic"


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_gpu_operator(bias):
    x, weight, shift = tensors((2, 4, 3, 8), 3, torch.bfloat16, "cuda")
    torch.library.opcheck(torch.ops.vmamba.depthwise_silu.default, (x, weight, shift if bias else None, "cuda"))


@pytest.mark.gpu
def test_gpu_part_of_a_wider_map():
    x, weight, bias = tensors((2, 5, 6, 48), 3, torch.bfloat16, "cuda")
    half = x.detach()[..., 24:]
    dy = torch.randn(half.shape, device="cuda", dtype=half.dtype)
    weight, bias = weight[24:].detach(), bias[24:].detach()
    got, right = (
        (module.forward(half, weight, bias), *module.backward(dy, half, weight, bias))
        for module in (depthwise_silu_cuda, depthwise_silu_reference)
    )
    for one, two in zip(got, right, strict=True):
        assert torch.allclose(one.float(), two.float(), rtol=2e-2, atol=2e-2)

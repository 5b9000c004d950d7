"""The fused LayerNorm: Triton's kernels in Triton's interpreter (a process of its own), and the module.

CUDA C++ needs a GPU; ``test_nvrtc.py`` compiles it.
"""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch import nn

from vmamba.kernels import layer_norm_cuda
from vmamba.kernels import layer_norm_reference as reference
from vmamba.norm import LayerNorm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(3, 5, 96), (1, 1, 7), (2, 130, 33), (4, 768), (1, 3000)]


def tensors(shape, dtype=torch.float32, device="cpu"):
    torch.manual_seed(shape[-1])
    x, weight, bias = torch.randn(shape) * 3 + 1, torch.randn(shape[-1]), torch.randn(shape[-1])
    return [t.to(device).requires_grad_() for t in (x.to(dtype), weight, bias)]


def values_and_gradients(forward, leaves, dtype):
    y = forward(*leaves, 1e-5, dtype)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def errors(leaves, dtype, backend="triton"):
    module = import_module(f"vmamba.kernels.layer_norm_{backend}")
    got = values_and_gradients(module.forward, leaves, dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    right = values_and_gradients(reference.forward, exact, torch.float64)
    assert [t.dtype for t in got] == [dtype, *(t.dtype for t in leaves)]
    return [float((g.double() - r).norm() / r.norm()) for g, r in zip(got, right, strict=True)]


if INTERPRETED:
    from tests import interpreter  # noqa: F401

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_kernels(shape, monkeypatch):
        from vmamba.kernels import layer_norm_triton

        monkeypatch.setattr(layer_norm_triton, "PROGRAMS", 3)
        assert max(errors(tensors(shape), torch.float32)) < 1e-6


def test_triton_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_kernels"]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert f"{len(SHAPES)} passed" in ran.stdout


def test_on_the_cpu_it_is_pytorchs_own():
    x, ours, theirs = torch.randn(2, 3, 5, 24), LayerNorm(24), nn.LayerNorm(24, 1e-5)
    assert torch.equal(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("channels", [1, 7, 8, 96, 132, 512, 513, 768, 1536, 3000, 8191, 8192])
@pytest.mark.parametrize("aligned", [True, False])
def test_plan_covers_the_channels(channels, aligned):
    plan = layer_norm_cuda.plan(channels, aligned)
    step = plan.lanes * plan.pack
    assert step * (plan.per - 1) < channels <= step * plan.per and channels % plan.pack == 0
    assert plan.per * plan.pack <= 32


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("shape", [*SHAPES, (128, 56, 56, 96), (8, 1536), (3, 8192), (5, 8191)], ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_gpu_values_and_gradients(shape, dtype, bound, backend):
    first, second = (errors(tensors(shape, dtype, "cuda"), dtype, backend) for _ in range(2))
    assert max(first) < bound
    assert first == second


@pytest.mark.gpu
def test_gpu_one_type_in_and_another_out():
    assert max(errors(tensors((4, 9, 192), torch.float32, "cuda"), torch.bfloat16, "cuda")) < 4e-3
    assert max(errors(tensors((4, 9, 192), torch.bfloat16, "cuda"), torch.float32, "cuda")) < 4e-3


@pytest.mark.gpu
def test_gpu_first_in_autograds_thread():
    code = """
import torch
from vmamba.kernels import layer_norm_cuda as norm
x, w, b = torch.randn(2, 96, device="cuda", requires_grad=True), *torch.randn(2, 96, device="cuda")
norm.forward(x, w, b, 1e-5, torch.float32).sum().backward()
assert x.grad.isfinite().all()
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.gpu
def test_gpu_any_memory():
    norm, part = LayerNorm(96).cuda(), torch.randn(10 * 96 + 1, device="cuda")[1:].view(10, 96)
    for x in (part, part.T.contiguous().T, part[:0]):
        assert torch.allclose(norm(x), nn.functional.layer_norm(x, (96,)), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("wide", [True, False])
def test_gpu_autocast(wide):
    norm, x = LayerNorm(96, wide=wide).cuda(), torch.randn(4, 7, 96, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = norm(x)
        assert y.dtype == (torch.float32 if wide else torch.bfloat16)
        assert torch.allclose(y.float(), nn.functional.layer_norm(x, (96,)), atol=2e-2)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16

"""Kernels go to the GPU of their tensors, whichever is current: networks on the second of two, and on both at once."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import vmamba
from vmamba.kernels.backends import use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
NETWORKS = {
    "vmamba_tiny_s1l8": {"depths": (1, 1, 1, 1), "dim": 32},  # scan2d, layer_norm, depthwise_silu
    "vanilla_vmamba_tiny": {"depths": (1, 1, 1, 1), "dim": 32},  # 16 states
    "vmamba_tiny_m2": {"depths": (1, 1, 1, 1), "dim": 64},  # Mamba-2
    "vim_tiny_patch16_224": {"depth": 2, "img_size": 64},  # selective_scan, route_conv, gated_merge, add_norm
}


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network(name):
    torch.manual_seed(0)
    return vmamba.create_model(name, num_classes=10, drop_path_rate=0.0, **NETWORKS[name])


def trained(model, device, dtype):
    """Scores and gradients of a step, and scores without gradients, on the CPU."""
    model, image = model.to(device), torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        scores = model(image)
        with torch.no_grad():
            plain = model.eval()(image)
    scores.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert {t.device for t in (scores, plain, *gradients)} == {torch.device(device)}
    return [t.detach().cpu() for t in (scores, plain, *gradients)]


@pytest.mark.parametrize("backend", ["", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_on_the_second_gpu_while_the_first_is_current(name, dtype, backend):
    """The same bits as on the first: same kernels, nothing atomic in ours; cuBLAS and cuDNN may choose otherwise."""
    torch.cuda.set_device(0)
    results = []
    for device in ("cuda:0", "cuda:1"):
        with use_backend(backend) if backend else nullcontext():
            results.append(trained(network(name), device, dtype))
        assert torch.cuda.current_device() == 0
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_data_parallel(name):
    """``nn.DataParallel`` over two GPUs, whose threads start without a CUDA context, computes what one does."""
    alone = trained(network(name), "cuda:0", torch.float32)
    model, image = network(name).to("cuda:0"), torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    scores = nn.DataParallel(model, [0, 1])(image.to("cuda:0"))
    scores.square().mean().backward()
    got = [scores, *(p.grad for p in model.parameters() if p.grad is not None)]
    for one, two in zip((alone[0], *alone[2:]), got, strict=True):
        torch.testing.assert_close(two.detach().cpu(), one, rtol=1e-3, atol=1e-5)

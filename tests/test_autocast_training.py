"""200 steps of training under autocast follow those in float32: bfloat16 on a CPU, float16 as well on a GPU."""

import pytest
import torch
from torch.nn import functional as F

import vmamba

SMALL = {"depths": (1, 1, 1, 1), "dim": 32, "drop_path_rate": 0}
NETWORKS = {  # settings for images of a side
    "vmamba_tiny_s1l8": lambda side: SMALL,  # selective scans of one state
    "vmamba_tiny_m2": lambda side: SMALL,  # state-space duality
    "vim_tiny_patch16_224": lambda side: {"depth": 2, "dim": 64, "img_size": side},  # 16 states, causal convolutions
}
SIDES = {"cpu": 32, "cuda": 64}
networks = pytest.mark.parametrize("name", NETWORKS)


def losses(name, device, dtype, *, enabled, steps=200):
    """The mean of every four steps' losses, of random images that are learned by heart."""
    torch.manual_seed(0)
    side = SIDES[device]
    model = vmamba.create_model(name, num_classes=4, **NETWORKS[name](side)).to(device)
    images, labels = torch.randn(32, 3, side, side).to(device), torch.arange(32, device=device) % 4
    optimiser, scaler = torch.optim.AdamW(model.parameters(), 1e-3), torch.amp.GradScaler(device, enabled=enabled)
    found = []
    for step in range(steps):
        batch = torch.arange(8, device=device) + step % 4 * 8
        with torch.autocast(device, dtype, enabled=enabled):
            loss = F.cross_entropy(model(images[batch]).float(), labels[batch])
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).view(-1, 4).mean(1).cpu()


def check(name, device, dtype):
    wide, narrow = (losses(name, device, dtype, enabled=enabled) for enabled in (False, True))
    assert torch.isfinite(narrow).all()
    assert (wide - narrow).abs().max() < 0.1 * wide.max()
    assert narrow[-1] < 0.5 * narrow[0]


@networks
def test_on_a_cpu(name):
    check(name, "cpu", torch.bfloat16)


@pytest.mark.gpu
@networks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(name, dtype):
    check(name, "cuda", dtype)

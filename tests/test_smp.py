"""segmentation-models-pytorch decoders on the zoo's backbones, through their timm names."""

import pytest
import segmentation_models_pytorch as smp
import torch

from tests.timm_zoo import KINDS, image, shrunk, small

PYRAMIDS = [name for name in KINDS if small(name, device="meta").strides == (4, 8, 16, 32)]  # smp takes no others


def train_one_step(model, x):
    target = (image(x.shape[0], 1, *x.shape[2:]) > 0).float()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        logits = model(x)
        assert logits.shape == target.shape
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_unet_at_published_size():
    torch.manual_seed(0)
    train_one_step(smp.Unet("tu-vmamba_tiny_s1l8", encoder_weights=None), image(2))


@pytest.mark.parametrize("name", PYRAMIDS)
def test_unet(name):
    torch.manual_seed(0)
    train_one_step(smp.Unet(f"tu-{name}", encoder_weights=None, in_channels=2, **shrunk(name)), image(2, 2, 64, 96))


@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_encoder_depth(name, depth):
    encoder = smp.encoders.get_encoder(f"tu-{name}", depth=depth, weights=None, **shrunk(name)).eval()
    with torch.no_grad():
        maps = encoder(image(1, 3, 64, 32))
    assert len(maps) == depth + 1 and encoder.out_channels == [3, 0, 16, 32, 64, 128][: depth + 1]
    for i, y in enumerate(maps):
        assert y.shape == (1, encoder.out_channels[i], 64 >> i, 32 >> i)

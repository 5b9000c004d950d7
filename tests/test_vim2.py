"""ViM2: the channel mixer's equation, the weighted sums, the sizes that the paper gives."""

import re

import pytest
import torch
from torch.nn import functional as F

import vmamba
from vmamba.mixers.channel import ChannelMixer
from vmamba.mixers.ss2d import SS2D
from vmamba.models import vim2

SMALL = {"depths": (1, 2), "dim": 8, "num_classes": 5}


def small(**options):
    torch.manual_seed(0)
    return vmamba.create_model("vim2_tiny", **{**SMALL, "drop_path_rate": 0.0, **options}).eval()


def test_parameters_are_near_the_published_ones():
    found = [
        sum(p.numel() for p in vmamba.create_model(f"vim2_{size}", device="meta").parameters()) / 1e6
        for size in ("tiny", "small", "base")
    ]
    for count, published, slack in zip(found, (20, 43, 74), (0.21, 0.02, 0.025), strict=True):
        assert count == pytest.approx(published, rel=slack)
    told = re.search(r"makes ([\d.]+), ([\d.]+) and ([\d.]+) million", vim2.__doc__).groups()
    assert [f"{count:.1f}" for count in found] == list(told)


def test_depths_and_widths():
    model = vmamba.create_model("vim2_small", device="meta")
    kinds = [[type(block.mixer) for block in stage.blocks] for stage in model.stages]
    layer = [SS2D, SS2D, ChannelMixer]
    assert kinds == [layer, layer, 9 * layer, layer]
    assert [stage.blocks[2].mixer.out_proj.in_features for stage in model.stages] == [192, 384, 768, 768]
    alternating = small(token_mixers=1)
    assert [type(block.mixer) for block in alternating.stages[1].blocks] == [SS2D, ChannelMixer] * 2


def by_hand(mixer, u):
    """The equation of the class's docstring for u (1, h, w, d), channel by channel."""
    h, w, d = u.shape[1:]
    cells = F.adaptive_avg_pool2d(u[0].permute(2, 0, 1), mixer.grid).flatten(1)  # (d, grid * grid)
    pixels, y = u.reshape(h * w, d), torch.zeros(h * w, d, dtype=u.dtype)
    for k, channels in enumerate((range(d), reversed(range(d)))):
        dt, B, C = (cells @ mixer.x_proj[k].T).split([1, mixer.state, mixer.state], -1)
        delta, A = F.softplus(dt[:, 0] + mixer.dt_bias[k]), -mixer.A_log[k].exp()
        state = torch.zeros(h * w, mixer.state, dtype=u.dtype)
        for c in channels:
            state = (delta[c] * A).exp() * state + delta[c] * pixels[:, c, None] * B[c]
            column = state @ C[c] + mixer.D[k] * pixels[:, c]
            y = y + F.pad(column[:, None], (c, d - 1 - c))
    return y.view(1, h, w, d)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_channel_scan_and_its_gradients(grid):
    torch.manual_seed(0)
    mixer = ChannelMixer(3, state=4, grid=2).double()
    u, weight = (torch.randn(1, *grid, 6, dtype=torch.float64, requires_grad=i == 0) for i in range(2))
    parts = [u, mixer.x_proj, mixer.dt_bias, mixer.A_log, mixer.D]
    results = [mixer.scan_map(u), by_hand(mixer, u)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad((y * weight).sum(), parts) for y in results]
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_channel_mixing_takes_pixels_in_any_order():
    torch.manual_seed(0)
    mixer, x, order = ChannelMixer(8, grid=1), torch.randn(2, 3, 4, 8), torch.randperm(12)
    shuffled = x.flatten(1, 2)[:, order].view_as(x)
    y = mixer(x).flatten(1, 2)
    torch.testing.assert_close(mixer(shuffled).flatten(1, 2), y[:, order], rtol=1e-4, atol=1e-6)
    other = x.clone()
    other[:, 0, 0] += 1  # no pixel is mixed with another, but all help to choose
    assert not torch.allclose(mixer(other).flatten(1, 2)[:, 1:], y[:, 1:], rtol=1e-6)
    with torch.no_grad():
        mixer.x_proj.zero_()
    assert torch.equal(mixer(other)[:, 1:], mixer(x)[:, 1:])


@torch.no_grad()
def test_a_new_network_is_a_residual_network():
    model, x = small(), torch.randn(2, 5, 4, 16)
    y = x
    for block in model.stages[1].blocks:
        y = y + block.mixer(block.norm(y))
    torch.testing.assert_close(model.stages[1].run(x), y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_mixer_reads_all_that_came_before():
    model, x = small(), torch.randn(2, 5, 4, 16)
    blocks = model.stages[1].blocks
    assert [len(block.sum.weight) for block in blocks] == [2, 3, 4, 5, 6, 7]
    for block in blocks:
        block.sum.weight.copy_(torch.randn(len(block.sum.weight)))
    maps, y = [x], x
    for block in blocks:
        maps.append(block.mixer(block.norm(y)))
        y = sum(weight * m for weight, m in zip(block.sum.weight, maps, strict=True))
    torch.testing.assert_close(model.stages[1].run(x), y, rtol=1e-4, atol=1e-5)

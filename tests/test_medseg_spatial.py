"""Patches that are turned and scaled: where their pixels come from, and how often that happens."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("monai")
from vmamba.medical.spatial import PROBABILITY, SCALE, RandPatchd, resampled, rotation

MODES = {"image": "bilinear", "label": "nearest"}


def sample(*shape):
    draw = torch.Generator().manual_seed(0)
    return torch.rand(2, *shape, generator=draw), torch.randint(0, 3, (1, *shape), generator=draw).float()


@pytest.mark.parametrize(("shape", "patch"), [((9, 12), (5, 6)), ((6, 9, 12), (3, 5, 8)), ((4, 4), (6, 4))])
@pytest.mark.parametrize("mode", MODES.values())
def test_the_centre_of_a_map(shape, patch, mode):
    """Resampled by the identity, and cut out; larger patches have zeros around the map."""
    x = sample(*shape)[0]
    got = resampled(x, patch, torch.eye(len(patch), dtype=torch.float64), mode)
    if all(m <= n for m, n in zip(patch, shape, strict=True)):
        torch.testing.assert_close(got, resampled(x, patch, None, mode), rtol=1e-5, atol=1e-5)
        starts = [n // 2 - m // 2 for n, m in zip(shape, patch, strict=True)]
        assert resampled(x, patch, None, mode)[0].flatten()[0] == x[(0, *starts)]
    else:
        torch.testing.assert_close(got[:, 1:5], x, rtol=1e-5, atol=1e-5)
        assert not got[:, [0, 5]].any()


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("mode", MODES.values())
def test_a_quarter_turn(axis, mode):
    x = sample(7, 7, 7)[0]
    angles = [math.pi / 2 if i == axis else 0.0 for i in range(3)]
    sides = [side + 1 for side in range(3) if side != axis]
    turned = resampled(x, (7, 7, 7), rotation(angles), mode)
    torch.testing.assert_close(turned, x.rot90(-1, sides), rtol=1e-4, atol=1e-4)
    if axis == 0:
        flat = resampled(x, (7, 7, 7), rotation(angles), mode, flat=True)
        torch.testing.assert_close(flat, turned, rtol=1e-4, atol=1e-4)
        image = resampled(x[:, 3], (7, 7), rotation([math.pi / 2]), mode)
        torch.testing.assert_close(image, turned[:, 3], rtol=1e-4, atol=1e-4)


def test_a_flat_volume_is_its_slices():
    """Turned and scaled in their planes, as the volume is; the first axis is cut."""
    x, matrix = sample(6, 16, 18)[0], rotation([0.3, 0.0, 0.0]) @ torch.tensor([1.0, 0.8, 1.3]).double().diag()
    for mode in MODES.values():
        flat = resampled(x, (4, 9, 11), matrix, mode, flat=True)
        whole = resampled(x, (4, 9, 11), matrix, mode)
        assert ((flat - whole).abs() < 1e-4).float().mean() > 0.99  # nearest may be either of two at equal distances
        assert torch.equal(flat[:, 1], resampled(x[:, 2], (9, 11), matrix[1:, 1:], mode))


def test_twice_the_step_halves_the_map():
    x = torch.arange(9.0).expand(1, 9, 9)
    got = resampled(x, (5, 5), 2 * torch.eye(2, dtype=torch.float64), "bilinear")
    torch.testing.assert_close(got, torch.arange(0.0, 9, 2).expand(1, 5, 5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "angles", "flat"), [((5, 8, 8), (3.0, 0.0, 0.0), True), ((8, 8), (0.5,), False)])
def test_draws(shape, angles, flat):
    """A fifth is turned and a fifth scaled; image and label go the same way, and labels stay labels."""
    transform, (image, label) = RandPatchd(MODES, [n - 2 for n in shape], angles, flat), sample(*shape)
    transform.set_random_state(state=np.random.RandomState(0))
    moved, axes = 0, len(shape)
    for _ in range(400):
        out = transform({"image": image, "label": label})
        assert out["image"].shape[1:] == out["label"].shape[1:] == tuple(n - 2 for n in shape)
        assert set(out["label"].unique().tolist()) <= {0.0, 1.0, 2.0}
        if transform.matrix is None:
            assert torch.equal(out["label"], resampled(label, transform.patch, None, "nearest"))
            continue
        moved += 1
        volume = abs(torch.linalg.det(transform.matrix).item())
        assert SCALE[0] ** axes <= volume <= SCALE[1] ** axes
        if flat:
            assert torch.equal(transform.matrix[0], torch.eye(3, dtype=torch.float64)[0])
    assert abs(moved / 400 - (1 - (1 - PROBABILITY) ** 2)) < 0.06

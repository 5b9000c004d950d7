"""Augmented samples: drawn from their seed alone, by every transform, and left without MONAI's history."""

import pytest
import torch

pytest.importorskip("monai")
from monai.data.meta_obj import get_track_meta
from monai.transforms.compose import Compose
from monai.transforms.transform import Randomizable

from vmamba.medical.drawn import transformed
from vmamba.medical.patches import AUGMENTATIONS as PATCHES
from vmamba.medical.transforms import AUGMENTATIONS as SLICES

LISTS = {
    "patch": lambda: PATCHES["standard"][1]((20, 24)),
    "volume": lambda: PATCHES["standard"][1]((8, 12, 10)),
    **SLICES,
}
SHAPES = {"patch": (24, 29), "volume": (10, 14, 12)}


@pytest.fixture(scope="module", params=LISTS)
def case(request):
    """A list of transforms, and a sample."""
    shape, draw = SHAPES.get(request.param, (32, 32)), torch.Generator().manual_seed(0)
    image, label = torch.rand(2, *shape, generator=draw), torch.randint(0, 3, (1, *shape), generator=draw).float()
    return Compose(LISTS[request.param]()), {"image": image, "label": label}


def test_a_seed_decides_every_draw(case):
    transform, sample = case
    first = [transformed(transform, sample, seed) for seed in range(12)]
    for seed in reversed(range(12)):
        again = transformed(transform, sample, seed)
        for key, value in first[seed].items():
            assert type(value) is torch.Tensor and torch.equal(value, again[key])
    if any(isinstance(part, Randomizable) for part in transform.transforms):
        assert len({s["image"].numpy().tobytes() for s in first}) >= 4  # mirrored along either axis, or both, or not


def test_monai_keeps_histories_as_before(case):
    assert get_track_meta()
    with pytest.raises(RuntimeError, match="applying transform"):
        transformed(Compose([lambda x: x["none"]]), case[1], 0)
    assert get_track_meta()

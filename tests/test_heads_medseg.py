"""``vmamba medseg train`` finds every 2D segmentation network and trains it."""

import pytest
import torch

from tests.segmentors import NAMES, SHRINK, image, small
from vmamba.medical.module import Segmenter
from vmamba.medical.spec import Settings, Spec
from vmamba.registry import entries

MAPS = [name for name in NAMES if small(name).axes == 2]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("name", MAPS)
def test_one_step_of_training(name):
    model = small(name, in_chans=1)
    patch = list(image(model).shape[2:])
    settings = entries()[name].settings
    network = dict(SHRINK[type(model)])
    if "strides" in settings:
        network["strides"] = settings["strides"][: len(network["features"])]
    if "patch" in settings:
        network["patch"] = patch
    values, classes = [0, 1, 2], ["background", "ball", "box"]
    spec = Spec(name, network, channels=1, values=values, classes=classes, patch=patch, axis=2, normalisation="zscore")
    torch.manual_seed(0)
    module = Segmenter(spec, Settings(model=name, lr=1e-2)).train()
    batch = torch.randn(2, 1, *patch), torch.randint(0, 3, (2, *patch)), torch.ones(2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = module.training_step(batch, 0)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]

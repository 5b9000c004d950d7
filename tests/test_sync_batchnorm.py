"""Batch norms of every kind of network survive the conversions of PyTorch, timm and OpenMMLab, there and back."""

import copy

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.timm_zoo import KINDS, image, small


class AnyBatchNorm(_BatchNorm):
    """What mmengine puts in the place of synchronised norms: one that takes any number of axes."""

    def _check_input_dim(self, input):
        return


def reverted(module):
    """As ``mmengine.model.revert_sync_batchnorm`` does it."""
    if not isinstance(module, nn.SyncBatchNorm):
        for name, child in module.named_children():
            module.add_module(name, reverted(child))
        return module
    plain = AnyBatchNorm(module.num_features, module.eps, module.momentum)
    plain.load_state_dict(module.state_dict())
    return plain.train(module.training)


def norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


NORMED = [name for name in KINDS if norms(small(name, device="meta"))]
CONVERTERS = [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm]


def test_networks_are_found():
    assert len(NORMED) >= 5


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("convert", CONVERTERS, ids=["torch", "timm"])
@torch.no_grad()
def test_there_and_back(name, convert):
    model, x = small(name), image(2)
    for norm in norms(model).values():  # statistics and weights that do something
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
    expected, keys = model.eval()(x), list(model.state_dict())
    converted = convert(copy.deepcopy(model))
    assert norms(converted).keys() == norms(model).keys() and list(converted.state_dict()) == keys
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms(converted).values())
    torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=1e-6)
    back = reverted(converted)
    assert not any(isinstance(norm, nn.SyncBatchNorm) for norm in back.modules())
    assert list(back.state_dict()) == keys
    torch.testing.assert_close(back(x), expected, rtol=1e-5, atol=1e-6)

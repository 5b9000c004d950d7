"""Forward, backward and classifier of every kind of timm model in the zoo."""

import copy
import time

import pytest
import timm
import torch
from torch import nn

from tests.timm_zoo import KINDS, PYRAMIDS, check_side, classifiers, image, small

SIZES = [(32, 32), (33, 33), (31, 45), (50, 72), (97, 97)]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_any_size(name, size):
    model = small(name).eval()
    with torch.no_grad():
        y = model(image(1, 3, *size))
    assert y.shape == (1, 1000) and y.isfinite().all()


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_published_size(name):
    model = timm.create_model(name).eval()
    started = time.perf_counter()
    y = model(image(1, *model.pretrained_cfg["input_size"]))
    assert y.shape == (1, 1000) and y.isfinite().all()
    assert time.perf_counter() - started < 60  # timm's own tests allow 120 s


@pytest.mark.parametrize("name", KINDS)
def test_backward_reaches_every_parameter(name):
    model = small(name, num_classes=42).train()
    y = model(image(2))
    assert y.shape == (2, 42)
    y.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_training_at_batch_size_one(name):
    model = small(name, num_classes=3).train()
    side = max(model.strides[-1], 16) + 1  # batch norms need more than one pixel
    model(image(1, 3, side, side + 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_channels_last_image(name):
    model, x = small(name).eval(), image(2)
    with torch.no_grad():
        assert torch.equal(model(x), model(x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_changes_nothing(name):
    model, x = small(name, num_classes=5, drop_path_rate=0.0).train(), image(2)
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    switches = [module for module in model.modules() if hasattr(module, "grad_checkpointing")]
    assert switches and all(module.grad_checkpointing for module in switches)
    again = model(x)
    again.square().sum().backward()
    assert torch.allclose(y, again, rtol=1e-4, atol=1e-5)
    for grad, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())
    model.set_grad_checkpointing(False)
    assert not any(module.grad_checkpointing for module in switches)


@pytest.mark.parametrize("name", KINDS)
def test_drop_path_acts_in_training_alone(name):
    model, x = small(name, drop_path_rate=0.9), image(2)
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    assert not all(torch.equal(model(x), model(x)) for _ in range(8))


@pytest.mark.parametrize("name", KINDS)
def test_classifier(name):
    model, x = small(name).eval(), image(2)
    heads = tuple(model.get_submodule(name) for name in classifiers(model))
    assert model.get_classifier() == (heads if len(heads) > 1 else heads[0])
    assert all(isinstance(head, nn.Linear) for head in heads)
    maps = model.forward_features(x)
    assert maps.ndim == len(model.output_fmt) and maps.shape[0] == 2 and maps.shape[-1] == model.num_features
    if name in PYRAMIDS:
        check_side(maps.shape[1], 64, model.strides[-1])
    pooled = model.forward_head(maps, pre_logits=True)
    assert torch.equal(model.forward_head(maps), sum(head(pooled) for head in heads) / len(heads))

    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), maps)
    model.reset_classifier(10, "max")
    assert model(x).shape == (2, 10) and model.head.global_pool.pool_type == "max"
    model.reset_classifier(11)
    assert model(x).shape == (2, 11) and model.head.global_pool.pool_type == "max" and model.num_classes == 11


@pytest.mark.parametrize("name", KINDS)
def test_classifier_at_creation(name):
    x, width = image(2), small(name).num_features
    assert small(name, num_classes=0)(x).shape == (2, small(name).head_hidden_size)
    assert small(name, num_classes=0, global_pool="")(x).shape == small(name).forward_features(x).shape
    assert small(name, num_classes=4, global_pool="avgmax", drop_rate=0.5)(x).shape == (2, 4)
    wide = small(name, num_classes=4, global_pool="catavgmax")
    assert wide.head_hidden_size == 2 * width
    assert wide.forward_head(wide.forward_features(x), pre_logits=True).shape == (2, wide.head_hidden_size)


@pytest.mark.parametrize("name", KINDS)
def test_unknown_pooling(name):
    with pytest.raises(AssertionError, match="Invalid pool type: median"):
        small(name).reset_classifier(5, "median")
    with pytest.raises(AssertionError, match="Invalid pool type: median"):
        small(name, global_pool="median")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("pool", [None, "max"])
def test_reset_keeps_device_type_mode_and_frozen_parameters(name, pool):
    model = small(name, dtype=torch.float64, drop_rate=0.3).eval().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    model.reset_classifier(6, pool)
    assert not any(m.training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.head.drop.p == 0.3
    prefixes = tuple(f"{name}." for name in classifiers(model))
    for key, p in model.named_parameters():
        assert p.requires_grad == key.startswith(prefixes)
        assert key.startswith(prefixes) or torch.equal(p, before[key])
    meta = small(name, device="meta")
    meta.reset_classifier(6, pool)
    assert {p.device.type for p in meta.parameters()} == {"meta"}

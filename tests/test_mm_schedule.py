"""Parameter groups for mmengine's optimisers: what does not decay, and learning rates by depth."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

import vmamba.mm  # noqa: F401
from tests.mm_parts import BACKBONES, small_cfg
from tests.timm_zoo import image

NAME = "vmamba_tiny_s1l8"


class Segmentor(BaseModule):
    """A backbone and a head, as mmseg names them."""

    def __init__(self, name, **options):
        super().__init__()
        self.backbone = MODELS.build(small_cfg(name, **options))
        self.decode_head = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


def groups(model, **paramwise):
    """name -> (learning rate, weight decay), for base values of 1."""
    optimizer = {"type": "AdamW", "lr": 1.0, "weight_decay": 1.0}
    cfg = {"type": "OptimWrapper", "optimizer": optimizer, "constructor": "VMambaOptimWrapperConstructor"}
    wrapper = build_optim_wrapper(model, {**cfg, "paramwise_cfg": paramwise} if paramwise else cfg)
    assert isinstance(wrapper, OptimWrapper)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group) for group in wrapper.optimizer.param_groups for p in group["params"]]
    assert len({name for name, _ in found}) == len(found)
    return {name: (group["lr"], group["weight_decay"]) for name, group in found}


@pytest.mark.parametrize("name", BACKBONES)
def test_what_decays(name):
    model = Segmentor(name)
    decays = {key: decay for key, (_, decay) in groups(model).items()}
    assert decays.keys() == dict(model.named_parameters()).keys()
    leaves = ("A_log", "D", "dt_bias", "bias", "pos_embed")
    for key, parameter in model.named_parameters():
        assert decays[key] == (0 if parameter.ndim < 2 or key.rsplit(".", 1)[-1] in leaves else 1), key
    assert {0, 1} == set(decays.values())
    kept = [key for key in decays if key.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias")]
    assert kept or name.startswith("ppma") or "hydra" in name or "mambavision" in name or "seg" in name


def test_vectors_can_decay():
    decays = {key: decay for key, (_, decay) in groups(Segmentor(NAME), spare_vectors=False).items()}
    assert decays["backbone.pyramid.norms.0.weight"] == decays["decode_head.0.bias"] == 1
    assert decays["backbone.pyramid.body.stages.0.blocks.0.mixer.A_log"] == 0


@pytest.mark.parametrize("name", BACKBONES)
def test_layers(name):
    """Learning rates rise from the stem to the head, where they are whole."""
    model = Segmentor(name)
    rates = {key: rate for key, (rate, _) in groups(model, decay_rate=0.5).items()}
    assert all(rate == 1 for key, rate in rates.items() if key.startswith(("decode_head", "backbone.pyramid.n")))
    order = [key for key in rates if key.startswith("backbone.pyramid.body")]
    stem, *blocks = [rates[key] for key in sorted(order, key=lambda key: rates[key])]
    assert rates["backbone.pyramid.body.stem." + order[0].split("stem.")[1]] == stem == min(rates.values())
    depth = sum(len(level.blocks) if hasattr(level, "blocks") else 1 for level in model.backbone.pyramid.body.levels)
    assert stem == 0.5 ** (depth + 1) and max(blocks) == 0.5
    assert sorted(set(rates.values())) == [0.5**power for power in range(depth + 1, -1, -1)]


def test_depth_of_a_parameter():
    """mmpretrain's protocol: (layer, number of layers)."""
    backbone = MODELS.build(small_cfg(NAME))
    body = "backbone.pyramid.body."
    asked = {
        "stem.conv1.weight": 0,
        "stages.0.blocks.0.mixer.A_log": 1,
        "stages.1.downsample.conv.weight": 2,
        "stages.1.blocks.0.norm1.weight": 2,
        "stages.2.blocks.1.mlp.fc1.bias": 4,
        "stages.3.blocks.0.mixer.D": 5,
    }
    assert {name: backbone.get_layer_depth(body + name, "backbone.") for name in asked} == {
        name: (layer, 7) for name, layer in asked.items()
    }
    assert backbone.get_layer_depth("pyramid.norms.3.weight") == (6, 7)


def test_custom_keys():
    keys = {
        "decode_head": {"lr_mult": 10.0},
        "decode_head.1": {"lr_mult": 3.0, "decay_mult": 0.5},
        "stem": {"lr_mult": 2},
    }
    found = groups(Segmentor(NAME), decay_rate=0.5, custom_keys=keys, spare_vectors=False)
    assert found["decode_head.0.weight"] == (10, 1) and found["decode_head.1.weight"] == (3, 0.5)
    assert found["backbone.pyramid.body.stem.conv1.weight"] == (2 * 0.5**6, 1)


def test_frozen_parameters_are_left_out():
    found = groups(Segmentor(NAME, frozen_stages=1))
    assert "backbone.pyramid.body.stages.1.blocks.0.norm1.weight" in found
    assert not any(".stem." in key or ".stages.0." in key or "norms.0" in key for key in found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay_rates": 0.9}, TypeError, "paramwise_cfg has no decay_rates; choose from decay_rate"),
        ({"decay_rate": 1.5}, ValueError, r"decay_rate must be in \(0, 1\], got 1\.5"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        groups(Segmentor(NAME), **options)


def test_layers_of_a_model_that_tells_none():
    with pytest.raises(ValueError, match="decay_rate needs a network with get_layer_depth; take VMambaBackbone"):
        groups(nn.Sequential(nn.Linear(2, 2)), decay_rate=0.9)


def test_a_step():
    """The rates are those that the optimiser applies: deeper layers move more."""
    torch.manual_seed(0)
    model = Segmentor(NAME, drop_path_rate=0.0)
    optimizer = {"type": "SGD", "lr": 1.0}
    cfg = {"optimizer": optimizer, "constructor": "VMambaOptimWrapperConstructor", "paramwise_cfg": {"decay_rate": 0.1}}
    wrapper = build_optim_wrapper(model, {"type": "OptimWrapper", **cfg})
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    loss = sum(y.square().mean() for y in model.backbone(image()))
    loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    wrapper.optimizer.step()
    for layer, key in ((6, "stem.conv1.weight"), (1, "stages.3.blocks.0.mlp.fc1.weight")):
        key = f"backbone.pyramid.body.{key}"
        moved = before[key] - dict(model.named_parameters())[key]
        torch.testing.assert_close(moved, gradients[key] * 0.1**layer, rtol=1e-2, atol=1e-7)

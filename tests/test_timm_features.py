"""Feature maps of every kind of timm model in the zoo: features_only, intermediates, pruning."""

import copy

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet

from tests.timm_zoo import KINDS, NAMES, PYRAMIDS, check_side, image, map_of, small


def nchw(maps, fmt):
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    return [y.permute(0, 3, 1, 2) if fmt == "NHWC" else y for y in maps]


@pytest.mark.parametrize("name", NAMES)
def test_features_only_at_published_size(name):
    model = timm.create_model(name, features_only=True, device="meta")
    info = model.feature_info
    size = model.pretrained_cfg["input_size"]
    maps = model(torch.empty(1, *size, device="meta"))
    assert isinstance(model, FeatureGetterNet) and len(maps) == len(info.out_indices) >= 3
    assert info.reduction() == sorted(info.reduction())
    for y, entry in zip(maps, info.get_dicts(), strict=True):
        assert {"num_chs", "reduction", "module"} <= entry.keys()
        assert y.shape[1] == entry["num_chs"]
        for side, full in zip(y.shape[2:], size[1:], strict=True):
            check_side(side, full, entry["reduction"])
    assert "classifier" not in model.pretrained_cfg and model.in_chans == size[0] and model._traits


@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize("cls", ["list", "dict", "hook", "fx"])
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing the model in eval mode")
def test_feature_classes_agree(name, cls):
    x = image(1, 3, 50, 72)
    expected = small(name, features_only=True).eval()
    other = small(name, features_only=True, feature_cls=cls).eval()
    with torch.no_grad():
        maps = nchw(other(x), other.output_fmt)
        for y, z in zip(expected(x), maps, strict=True):
            # what FX traced calls the layers one by one, whose products and GELU are one elsewhere
            assert torch.allclose(y, z, atol=1e-5) if cls == "fx" else torch.equal(y, z)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (33, 45), (97, 50)])
def test_features_of_any_size(name, size):
    channels = small(name).channels
    model = small(name, features_only=True, out_indices=(1, len(channels) - 1), in_chans=2).eval()
    with torch.no_grad():
        maps = model(image(2, 2, *size))
    assert [y.shape[1] for y in maps] == model.feature_info.channels() == [channels[1], channels[-1]]
    for y, reduction in zip(maps, model.feature_info.reduction(), strict=True):
        for side, full in zip(y.shape[2:], size, strict=True):
            check_side(side, full, reduction)


@pytest.mark.parametrize("name", KINDS)
def test_features_only_has_no_idle_parameter(name):
    model = small(name, features_only=True, out_indices=(0, 2)).train()
    sum(y.square().mean() for y in model(image(2))).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_features_only_with_gradient_checkpointing(name):
    model, x = small(name, features_only=True, drop_path_rate=0.0).train(), image(2)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.model.set_grad_checkpointing(enable)
        sum(y.square().mean() for y in model(x)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_forward_intermediates(name):
    model, x = small(name).eval(), image(2)
    final = model.forward_features(x)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, final) and len(maps) == len(model.feature_info)
    for y, entry in zip(maps, model.feature_info, strict=True):
        assert y.shape[:2] == (2, entry["num_chs"]) and y.shape[2] == y.shape[3] and y.is_contiguous()
        check_side(y.shape[2], 64, entry["reduction"])
    only = model.forward_intermediates(x, indices=2, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(y.permute(0, 3, 1, 2), z) for y, z in zip(only, maps[-2:], strict=True))
    normed = model.forward_intermediates(x, indices=[-1], norm=True, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(normed[0], map_of(model, final, normed[0]))
    torch.testing.assert_close(model.norm(maps[-1].permute(0, 2, 3, 1)), normed[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_stop_early(name):
    model, x = small(name).eval(), image(2)
    _, maps = model.forward_intermediates(x)
    stopped, taps = model.forward_intermediates(x, indices=[0, 1], stop_early=True, output_fmt="NHWC")
    assert all(torch.equal(y.permute(0, 3, 1, 2), z) for y, z in zip(taps, maps[:2], strict=True))
    assert torch.equal(map_of(model, stopped, taps[-1]), taps[-1])  # without the final norm
    _, normed = model.forward_intermediates(x, indices=[0, 1], norm=True, stop_early=True, output_fmt="NHWC")
    fits = name not in PYRAMIDS  # the norm of a pyramid is for the last stage alone
    assert all(torch.equal(y, model.norm(z) if fits else z) for y, z in zip(normed, taps, strict=True))
    full, _ = model.forward_intermediates(x, indices=[0, 1])
    assert torch.equal(full, model.forward_features(x))
    model.set_grad_checkpointing()
    with torch.enable_grad():
        _, again = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert all(torch.allclose(y, z, rtol=1e-4, atol=1e-5) for y, z in zip(again, maps[:2], strict=True))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "options, message", [({"indices": [7]}, "out of range"), ({"indices": 9}, "9"), ({"output_fmt": "NLC"}, "NLC")]
)
def test_wrong_intermediates(name, options, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        small(name).forward_intermediates(image(), **options)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("indices", [1, [0, 2], [-3]])
def test_prune(name, indices):
    model, x = small(name, drop_rate=0.2).eval(), image(2)
    last = len(model.levels) - 1
    kept = [last] if indices == 1 else [i % (last + 1) for i in indices]
    width = model.num_features if kept[-1] == last else model.channels[kept[-1]]
    with torch.no_grad():
        before = model.forward_intermediates(x, kept, intermediates_only=True)
    assert model.prune_intermediate_layers(indices) == kept
    assert not any(m.training for m in model.modules())
    with torch.no_grad():
        after = model.forward_intermediates(x, kept, intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(before, after, strict=True))
    assert torch.equal(model(x), model(x))
    assert model.num_features == model.head_hidden_size == width == model(x).shape[-1]
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_prune_at_the_last_stage(name):
    x, model = image(), small(name, num_classes=5).eval()
    logits, last = model(x), [len(model.levels) - 1]
    kept = copy.deepcopy(model)
    assert kept.prune_intermediate_layers(last, prune_head=False) == last
    assert torch.equal(kept(x), logits)
    bare = copy.deepcopy(model)
    bare.prune_intermediate_layers(last, prune_norm=True)
    stream = model.forward_intermediates(x, last, output_fmt="NHWC", intermediates_only=True)[0]
    assert torch.equal(map_of(model, bare(x), stream), stream)


@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_model_takes_a_new_classifier(name):
    model = small(name)
    model.prune_intermediate_layers([1])
    model.reset_classifier(5, "avg")
    assert model(image(2)).shape == (2, 5)

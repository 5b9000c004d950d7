"""What optimisers and initialisation ask of every kind of timm model in the zoo."""

import pytest
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from tests.timm_zoo import KINDS, PYRAMIDS, image, small


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher(name, coarse):
    model = small(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [parameter for group in groups.values() for parameter in group]
    assert sorted(names) == sorted(key for key, _ in model.named_parameters())
    blocks = sum(len(getattr(level, "blocks", [level])) for level in model.levels)
    assert len(groups) == 2 + (len(model.levels) if coarse else blocks)  # stem, stages or blocks, classifier
    assert all(key.startswith("stem.") for key in groups[0])
    assert {"head.fc.weight", "head.fc.bias"} <= set(groups[len(groups) - 1])


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_downsampling_belongs_to_the_block_after_it(name):
    model = small(name)
    layer = group_parameters(model, model.group_matcher(), reverse=True)
    downsampling = [key for key in layer if ".downsample." in key]
    assert downsampling
    for key in downsampling:
        stage = key.split(".downsample.")[0]
        assert layer[key] == next(layer[other] for other in layer if other.startswith(f"{stage}.blocks.0."))


@pytest.mark.parametrize("name", KINDS)
def test_weight_decay(name):
    model = small(name)
    spared = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert spared and spared <= parameters.keys()
    kinds = ("A_log", "D", "dt_bias", "pos_embed", "cls_token", "cls_pos")
    assert spared == {key for key in parameters if key.rsplit(".", 1)[-1] in kinds}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=spared)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert not decayed & {id(parameters[key]) for key in spared}
    layers = param_groups_layer_decay(model, 0.05, no_weight_decay_list=spared, layer_decay=0.7)
    assert sum(len(group["params"]) for group in layers) == len(parameters)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initialisation_after_meta(name, dtype):
    fresh = small(name, dtype=dtype)
    model = small(name, device="meta", dtype=dtype).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 7)  # batch norms count in integers
    torch.manual_seed(0)
    model.init_weights(needs_reset=True)
    for (key, tensor), expected in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert tensor.dtype == expected.dtype and tensor.isfinite().all(), key
        constant = not expected.is_floating_point() or (expected.numel() > 1 and expected.std(unbiased=False) == 0)
        if constant:
            assert torch.equal(tensor, expected), key
        elif expected.numel() >= 8:  # the same distribution: sums of n draws differ by a few deviations times sqrt(n)
            slack = 6 * expected.std() / expected.numel() ** 0.5
            assert abs(tensor.mean() - expected.mean()) < 2**0.5 * slack, key
            assert tensor.numel() < 64 or abs(tensor.std() - expected.std()) < slack, key
    assert model.eval()(image().to(dtype)).isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_initial_values(name):
    model = small(name)
    for path, module in model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            if "norm" in type(module).__name__.lower():
                gain = getattr(module, "gain", 1.0)  # 0 where a norm ends a residual branch
                assert torch.equal(tensor, torch.full_like(tensor, gain * (leaf == "weight"))), (path, leaf)
            if leaf == "D":
                assert (tensor == 1).all(), path
    state = model.state_dict()
    assert state["head.fc.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert (state["head.fc.bias"] == 0).all()

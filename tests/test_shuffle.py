"""The stochastic layer-wise shuffle: the original's figures, its statistics, and everything it must leave alone."""

import copy
import pickle

import pytest
import torch
from timm.models._features_fx import GraphExtractNet, get_graph_node_names
from torch import nn

import vmamba
from tests import goldens
from tests.timm_zoo import KINDS, image, shallow, small
from vmamba.block import PatchMerging
from vmamba.columnar import ColumnBlock
from vmamba.mixers.bimamba import BiMamba
from vmamba.models.vim import MIXER_KEYS
from vmamba.shuffle import LayerShuffle, layers_of, shuffle_layers

FAMILIES = {"vmamba_tiny_s1l8": dict(depths=(1, 1)), "vim_tiny_patch16_224": dict(depth=2)}


class Watch(nn.Module):
    """Remembers whether its input came in another order than 0, 1, 2, ..."""

    def __init__(self):
        super().__init__()
        self.moved: list[bool] = []

    def forward(self, x):
        self.moved.append(not torch.equal(x, x.sort(1).values))
        return x


def network(name="vmamba_tiny_s1l8", rate: float = 1.0, **options):
    torch.manual_seed(0)
    model = vmamba.create_model(name, **{**FAMILIES[name], "dim": 16, "num_classes": 5, "drop_path_rate": 0, **options})
    shuffle_layers(model, rate)
    return model


def step(model, x, seed=0):
    """Results and gradients of a pass in training."""
    model.train().zero_grad()
    torch.manual_seed(seed)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(b.abs().max().item(), 1))


@pytest.mark.parametrize("case", goldens.load("op_layer_shuffle")["cases"], ids=lambda case: case.get("what", "case"))
def test_golden(case, monkeypatch):
    block = ColumnBlock(64, mixer=BiMamba).double()
    model = nn.ModuleDict({"block": block})
    model.official_keys = [(r"^", "block."), *MIXER_KEYS]
    assert vmamba.load_checkpoint(model, goldens.fill_state(goldens.load("op_layer_shuffle"))).ok
    h, r, vector = goldens.case_inputs(case)
    r = None if "no residual" in case.get("what", "") else r
    monkeypatch.setattr(torch, "randperm", lambda length, device: vector.argsort(stable=True))
    results = {"plain": block(h, r, (1, h.shape[1]))}
    shuffle_layers(model, 1.0, layers=[nn.Module(), block])
    results["shuffled"] = block(h, r, (1, h.shape[1]))
    for name, pair in results.items():
        for part, y in zip(("hidden", "residual"), pair, strict=True):
            assert goldens.compare(y, case["outputs"][f"{name}.{part}"]) < 1e-12


def test_probabilities_rise_linearly():
    layers = [Watch() for _ in range(4)]
    model = nn.Sequential(*layers)
    shuffle_layers(model, 0.6, layers=layers)
    torch.manual_seed(0)
    for _ in range(500):
        model(torch.arange(30.0).view(1, 5, 6, 1))
    found = [sum(layer.moved) / 500 for layer in layers]
    assert found[0] == 0 and found[1:] == pytest.approx([0.2, 0.4, 0.6], abs=0.07)
    assert len({tuple(a) for a in zip(*(layer.moved for layer in layers), strict=True)}) == 8  # layers draw alone


def test_what_does_not_look_at_the_order_is_unchanged():
    layer = nn.Linear(6, 4)
    x = torch.randn(2, 5, 7, 6, requires_grad=True)
    y = layer(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    shuffle_layers(layer, 1.0, layers=[nn.Module(), layer])
    assert type(layer).__name__ == "ShuffledLinear" and torch.allclose(layer(x), y, atol=1e-6)
    close(torch.autograd.grad(layer(x).square().sum(), x), [expected])


@pytest.mark.parametrize("name", KINDS)
def test_every_network(name):
    model, x = small(name, **shallow(name), drop_path_rate=0.0), image(2)
    layers = layers_of(model)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)  # norms at the end of branches that start as nothing
    before, state = model.eval()(x), copy.deepcopy(model.state_dict())
    shuffle_layers(model, 1.0)
    assert [isinstance(layer, LayerShuffle) for layer in layers] == [False] + [True] * (len(layers) - 1)
    assert list(model.state_dict()) == list(state) and torch.equal(model(x), before)
    model.train()
    runs = [torch.manual_seed(seed) and model(x) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2], atol=1e-6)
    runs[2].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    shuffle_layers(model, 0.0)
    assert not any(isinstance(module, LayerShuffle) for module in model.modules())
    model.load_state_dict(state)  # statistics of batch norms
    assert torch.equal(model.eval()(x), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_order_for_the_batch(name):
    y = network(name).train()(image().expand(3, -1, -1, -1))
    assert torch.allclose(y[0], y[1], atol=1e-6) and torch.allclose(y[0], y[2], atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(name, clone):
    model, x = network(name), image(2)
    twin = clone(model)
    assert repr(twin) == repr(model) and all(map(torch.equal, step(twin, x), step(model, x)))
    assert not any(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_draws_the_same_order(name):
    model, x = network(name), image(2)
    expected = step(model, x)
    model.set_grad_checkpointing()
    close(step(model, x), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compile(name, checkpointing):
    model, x = network(name), image(2, 3, 33, 40)
    model.set_grad_checkpointing(checkpointing)
    expected = step(model, x)
    close(step(torch.compile(model, fullgraph=True, backend="aot_eager"), x), expected)
    torch.compiler.reset()


def test_compiled_layers_that_are_not_drawn_keep_their_order():
    model, x = network(), image(2, 3, 33, 40)
    for layer in layers_of(model):
        layer.shuffle_probability = 0.0
    close(step(torch.compile(model, fullgraph=True, backend="aot_eager"), x), step(network(rate=0.0), x))
    torch.compiler.reset()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing the model in eval mode")
def test_fx(name):
    model, x = network(name), image(2)
    train, _ = get_graph_node_names(model)
    traced = GraphExtractNet(copy.deepcopy(model).train(), [train[-1]])
    close(step(traced, x), step(model, x))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_distributed(name, tmp_path):
    model, x = network(name, rate=0.5), image(2)
    twin = copy.deepcopy(model)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(twin)
        for seed in range(4):  # with and without a drawn order: no parameter may be idle
            close(step(replica, x, seed), step(model, x, seed))
    finally:
        torch.distributed.destroy_process_group()


def test_meta_device_and_other_types():
    model = network(device="meta", dtype=torch.bfloat16)
    assert model.train()(image(2).to("meta", torch.bfloat16)).shape == (2, 5)
    assert network().bfloat16().train()(image(2).bfloat16()).isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        shuffle_layers(network(), 1.5)
    with pytest.raises(ValueError, match=r"Linear has no blocks of the zoo to shuffle; name its layers: layers="):
        shuffle_layers(nn.Linear(3, 3), 0.5)
    layer = PatchMerging(4, 8)
    shuffle_layers(layer, 1.0, layers=[nn.Module(), layer])
    with pytest.raises(ValueError, match=r"keeps the number of pixels, 16; got \(1, 2, 2, 8\)"):
        layer(torch.randn(1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"ShuffledPatchMerging needs a map \(b, l, c\)"):
        layer(torch.randn(4, 4))

"""VCMamba and its PlainMamba mixer: the original's inner maps, two classifiers, positions of other sizes."""

import pytest
import torch
from torch import nn

import vmamba
from tests import goldens
from vmamba.checkpoint import load_checkpoint
from vmamba.mixers.plainmamba import PlainMamba, directions, visits
from vmamba.models.vcmamba import KEYS, MambaBlock, Positions, VCMamba
from vmamba.scans import Scan, serpentine

GOLDEN = goldens.load("op_vcmamba_mixer")
EXACT = 1e-12  # of an output's standard deviation, in float64; reached: 1e-14
SMALL = {"depths": (1, 1, 1, 2), "dims": (8, 12, 16, 24), "mamba_blocks": 1, "grid": 3}


def small(**options):
    torch.manual_seed(0)
    return VCMamba(**{**SMALL, "num_classes": 5, **options})


def nchw(x):
    return x.permute(0, 3, 1, 2)


def loaded(module, **replaced):
    """``module`` in float64 and eval mode with the golden parameters; ``replaced`` turns our prefix into theirs."""
    module.double().eval().official_keys = [
        *((rf"^{theirs}\.", f"{ours}.") for ours, theirs in replaced.items()),
        *KEYS,
    ]
    prefixes = tuple(f"{theirs}." for theirs in replaced.values())
    load_checkpoint(module, {k: v for k, v in goldens.fill_state(GOLDEN).items() if k.startswith(prefixes)})
    return module


@pytest.fixture(scope="module")
def parts():
    block = MambaBlock(32, mixer=PlainMamba, positions=nn.Identity(), mlp_ratio=4, drop_path=0)
    return {
        "mixer": loaded(nn.ModuleDict({"mixer": PlainMamba(32)}), mixer="mixer")["mixer"],
        "layer": loaded(nn.ModuleDict({"blocks": nn.ModuleList([block])}), **{"blocks.0": "layer"})["blocks"][0],
    }


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["input"][0][0][2:]))
@torch.no_grad()
def test_mixer_and_block(parts, case):
    (x,) = goldens.case_inputs(case)
    h, w = x.shape[2:]
    order = serpentine.routes(h, w)
    found = {name: nchw(part(x.permute(0, 2, 3, 1))) for name, part in parts.items()}
    found |= {"orders": order, "inverse_orders": order.argsort(1), "directions": directions(order, w)}
    assert found.keys() == case["outputs"].keys()
    for name, tensor in found.items():
        assert goldens.compare(tensor, case["outputs"][name]) < EXACT, name


def test_parameters_of_the_mixer(parts):
    assert sum(p.numel() for part in parts.values() for p in part.parameters()) == GOLDEN["params"]


@torch.no_grad()
def test_inner_maps_of_the_network():
    golden = goldens.load("vcmamba_s")
    case = golden["cases"][0]
    model = vmamba.create_model("vcmamba_s").double().eval()
    load_checkpoint(model, goldens.fill_state(golden))
    first = model.stages[3].blocks[4]  # "mamba0" is taken between its mixer and its MLP
    found = {}
    first.positions.register_forward_pre_hook(
        lambda _, inputs: found.update({"stage3.before_pos_embed": nchw(inputs[0])})
    )
    first.norm2.register_forward_pre_hook(lambda _, inputs: found.update({"stage3.mamba0": inputs[0]}))
    found["pooled"] = model.forward_head(model.forward_features(*goldens.case_inputs(case)), pre_logits=True)
    for name, classifier in zip(("head", "dist_head"), model.get_classifier(), strict=True):
        found[name] = classifier(found["pooled"])
    for name, tensor in found.items():
        assert goldens.compare(tensor, case["outputs"][name]) < EXACT, name


def test_parameters_without_golden():
    model = vmamba.create_model("vcmamba_b", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 31_450_832


def test_two_classifiers():
    model, x = small().train(), torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 5)
    model.set_distilled_training()
    labels, teacher = model(x)
    assert labels.shape == teacher.shape == (2, 5) and not torch.equal(labels, teacher)
    (labels.sum() + teacher.square().sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.reset_classifier(7)
    assert [y.shape for y in model(x)] == [(2, 7), (2, 7)]
    features = model.eval().forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    first, second = (classifier(pooled) for classifier in model.get_classifier())
    assert torch.equal(model.forward_head(features), (first + second) / 2)
    model.train().set_distilled_training(False)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 24) and not list(model.head.parameters())


def test_positions_are_added_as_they_are_at_their_own_size():
    module = Positions(4, 3).double()
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    assert torch.equal(module(x), x + module.pos_embed.permute(0, 2, 3, 1))


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (6, 3), (9, 9)])
def test_positions_follow_the_size(grid):
    module, rows = Positions(1, 3), torch.tensor([0.0, 1.0, 2.0])
    with torch.no_grad():
        module.pos_embed.copy_(rows[:, None].expand(3, 3))
        y = module(torch.zeros(1, *grid, 1))[0, ..., 0]
    assert torch.allclose(y, y[:, :1]) and y.mean() == pytest.approx(1, abs=1e-5)
    assert (y.diff(dim=0) > 0).all()


@pytest.mark.parametrize("blocks", [0, 1, 9])
def test_any_number_of_mamba_blocks(blocks):
    model = small(mamba_blocks=blocks)
    mamba = [isinstance(block, MambaBlock) for stage in model.stages for block in stage.blocks]
    assert mamba == [False] * (5 - min(blocks, 2)) + [True] * min(blocks, 2)
    assert model.eval()(torch.randn(1, 3, 40, 97)).isfinite().all()


def test_segmentation_layout():
    """As mmsegmentation stores it for crops of 512: a position embedding of 16 x 16, no norms, a decoder beside it."""
    official = {key: torch.randn(shape) for key, shape in goldens.load("vcmamba_s")["state"].items()}
    official = {key: value for key, value in official.items() if not key.startswith(("norm.", "head.", "dist_head."))}
    official["pos_embed"] = torch.randn(1, 288, 16, 16)
    state = {"state_dict": {**{f"backbone.{k}": v for k, v in official.items()}, "decode_head.bias": torch.ones(2)}}
    model = vmamba.create_model("vcmamba_s_backbone", norm=False, grid=16)
    report = load_checkpoint(model, state)
    assert report.ok and report.ignored == ["decode_head.bias"]
    assert torch.equal(model.body.stages[3].blocks[4].positions.pos_embed, official["pos_embed"])
    with torch.no_grad():
        maps = model.eval()(torch.randn(1, 3, 64, 96))
    assert [tuple(y.shape[1:]) for y in maps] == [(32, 16, 24), (64, 8, 12), (144, 4, 6), (288, 2, 3)]


def by_hand(mixer, u):
    """The recurrence of the class's docstring, one step and one route at a time, for u (1, h, w, d)."""
    h, w, d = u.shape[1:]
    u, y = u.reshape(h * w, d), torch.zeros(h * w, d, dtype=u.dtype)
    dt, B, C = mixer.x_proj(u).split([mixer.rank, mixer.state, mixer.state], -1)
    delta = nn.functional.softplus(mixer.dt_proj(dt) + mixer.dt_proj.bias)
    A = -mixer.A_log.exp()
    for route in mixer.scan.routes(h, w).tolist():
        state, last = torch.zeros_like(A), None
        for t, pixel in enumerate(route):
            move = 0 if last is None else {1: 1, -1: 2, -w: 3, w: 4}[pixel - last]
            state = (delta[t, :, None] * A).exp() * state
            state = state + delta[t, :, None] * (B[t] + mixer.direction_B[move]) * u[pixel, :, None]
            y[pixel] = y[pixel] + state @ C[t] + mixer.D * u[pixel]
            last = pixel
    return y.view(1, h, w, d)


@pytest.mark.parametrize("scan", ["serpentine", "spiral"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 1)])
def test_recurrence_and_its_gradients(scan, grid):
    torch.manual_seed(0)
    mixer = PlainMamba(4, state=3, scan=scan).double()
    u = torch.randn(1, *grid, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, *grid, 8, dtype=torch.float64)
    parts = [u, mixer.x_proj.weight, *mixer.dt_proj.parameters(), mixer.A_log, mixer.D, mixer.direction_B]
    results = [scan_map(u) for scan_map in (mixer.scan_map, lambda u: by_hand(mixer, u))]
    grads = [torch.autograd.grad((y * weight).sum(), parts) for y in results]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scan", ["raster", "atrous", lambda h, w: torch.tensor([[0, h * w, 0, h * w - 1]])])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_scans_with_gaps_repeats_and_jumps(scan, grid):
    order = visits(*grid, scan)
    assert order.sort(1).values.tolist() == [list(range(grid[0] * grid[1]))] * Scan(scan).count
    torch.manual_seed(0)
    mixer, x = PlainMamba(8, state=2, scan=scan), torch.randn(2, *grid, 8)
    y = mixer(x)
    y.square().sum().backward()
    assert y.shape == x.shape and all(p.grad.isfinite().all() for p in mixer.parameters())

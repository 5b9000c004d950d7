"""MambaVision: inside the original's windows, variants without golden, windows and layouts of checkpoints."""

import pytest
import torch
from torch.nn import functional as F

import vmamba
from tests import goldens
from tests.parts import probe
from tests.timm_zoo import small
from vmamba.checkpoint import load_checkpoint
from vmamba.mixers.attention import SelfAttention
from vmamba.mixers.mambavision import MambaVisionMixer
from vmamba.models.mambavision import ConvBlock

GOLDEN = goldens.load("mambavision_t")
EXACT = 1e-12  # of an output's standard deviation, in float64; reached: 1e-14
PARAMETERS = {  # millions; the first three are counted from the original, the others are published
    "mambavision_t2": 35.104008,
    "mambavision_s": 50.140584,
    "mambavision_b": 97.685288,
    "mambavision_l": 227.9,
    "mambavision_l2": 241.5,
    "mambavision_l3": 739.6,
}
SMALL = {"depths": (1, 1, 2, 1), "dim": 8, "stem_dim": 4, "num_classes": 5}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_without_golden(name):
    count = sum(p.numel() for p in vmamba.create_model(name, device="meta").parameters()) / 1e6
    assert count == pytest.approx(PARAMETERS[name], abs=0.1 if PARAMETERS[name] > 100 else 1e-7)


@torch.no_grad()
def test_inside_the_network():
    model = vmamba.create_model("mambavision_t").double().eval()
    load_checkpoint(model, goldens.fill_state(GOLDEN))
    case, blocks = GOLDEN["cases"][0], model.stages[2].blocks
    maps: dict[str, torch.Tensor] = {}
    blocks[0].register_forward_pre_hook(lambda _, inputs: maps.update({"stage2.windows": inputs[0]}))
    points = {"stage2.block0": blocks[0], "stage2.block0.mixer": blocks[0].mixer, "pooled": model.head.drop}
    calls = probe(lambda: model(*goldens.case_inputs(case)), points)
    found = {"pooled": calls.pop("pooled")[0]}
    maps |= {key: y for key, (y,) in calls.items()}
    maps["stage2.first_attention"] = blocks[4].mixer(blocks[4].norm1(maps["stage2.windows"]))  # there on its own too
    found |= {key: y.flatten(1, 2) for key, y in maps.items()}
    assert found.keys() == case["outputs"].keys() - {"logits", "patch_embed", *(f"stage{i}" for i in range(4))}
    for key, y in found.items():
        assert goldens.compare(y, case["outputs"][key]) < EXACT, key


@pytest.mark.parametrize("name", ["mambavision_t", "mambavision_t2", "mambavision_s", "mambavision_l3"])
def test_the_last_half_of_a_stage_attends(name):
    model = vmamba.create_model(name, device="meta")
    first = {8: 4, 11: 6, 4: 2, 7: 4, 5: 3, 20: 10, 10: 5}  # depth -> the first block with attention
    for stage in model.stages[:2]:
        assert {type(block) for block in stage.blocks} == {ConvBlock}
    for stage in model.stages[2:]:
        scans = first[len(stage.blocks)]
        kinds = [MambaVisionMixer] * scans + [SelfAttention] * (len(stage.blocks) - scans)
        assert [type(block.mixer) for block in stage.blocks] == kinds


@pytest.mark.parametrize("size", [(3, 3), (7, 5), (1, 8)])
@torch.no_grad()
def test_windows_are_maps_of_their_own_filled_up_with_zeros(size):
    torch.manual_seed(0)
    model = vmamba.create_model("mambavision_t", windows=(None, None, 3, 2), **SMALL).double().eval()
    stage, (h, w) = model.stages[2], size
    x = torch.randn(2, h, w, 32, dtype=torch.float64)
    expected = torch.zeros(2, h + 2, w + 2, 32, dtype=torch.float64)
    filled = F.pad(x, (0, 0, 0, 2, 0, 2))
    for top in range(0, h, 3):
        for left in range(0, w, 3):
            window = slice(None), slice(top, top + 3), slice(left, left + 3)
            expected[window] = stage.blocks(filled[window])
    torch.testing.assert_close(stage.run(x), expected[:, :h, :w], rtol=1e-10, atol=1e-12)


def test_windows_compile_and_train():
    torch.manual_seed(0)
    options = {**SMALL, "depths": (1, 2), "windows": (None, 3), "heads": (1, 2), "drop_path_rate": 0.0}
    model = vmamba.create_model("mambavision_t", **options)
    model, x, grads = model.double().train(), torch.randn(2, 3, 33, 40, dtype=torch.float64), []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.compiler.reset()
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


def by_hand(mixer, x):
    """The mixer's equation for x (1, h, w, c), one step at a time in reading order."""
    x = F.linear(x, mixer.in_proj.weight).flatten(1, 2)[0]  # (l, c)
    x = F.silu(F.conv1d(x.T, mixer.conv.weight, padding=1, groups=x.shape[1]).T)
    u, z = x.chunk(2, -1)
    dt, B, C = (u @ mixer.x_proj[0].T).split([mixer.rank, mixer.state, mixer.state], -1)
    delta = F.softplus(dt @ mixer.dt_proj[0].T + mixer.dt_bias[0] + mixer.dt_bias[0])
    A, state, y = -mixer.A_log[0].exp(), torch.zeros_like(mixer.A_log[0]), []
    for t in range(len(u)):
        state = (delta[t, :, None] * A).exp() * state + delta[t, :, None] * B[t] * u[t, :, None]
        y.append(state @ C[t] + mixer.D[0] * u[t])
    return torch.cat([torch.stack(y), z], -1) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("grid", [(1, 1), (3, 4)])
def test_mixer_and_its_gradients(grid):
    torch.manual_seed(0)
    mixer = MambaVisionMixer(8, state=3).double()
    x = torch.randn(1, *grid, 8, dtype=torch.float64, requires_grad=True)
    weight, parts = torch.randn(grid[0] * grid[1], 8, dtype=torch.float64), [x, *mixer.parameters()]
    results = [mixer(x).flatten(0, 2), by_hand(mixer, x)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad((y * weight).sum(), parts) for y in results]
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_attention():
    torch.manual_seed(0)
    module, x = SelfAttention(8, heads=2).double(), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    q, k, v = module.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # (b, heads, l, d)
    y = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.proj(y).view_as(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [(lambda: SelfAttention(8, heads=3), "8 channels do not divide into 3"), (lambda: MambaVisionMixer(7), "even")],
)
def test_wrong_numbers_of_channels(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_layer_scale():
    model = small("mambavision_b")
    names = [name for name in model.state_dict() if ".scale" in name]
    assert len(names) == 2 * sum(len(stage.blocks) for stage in model.stages[2:])
    assert all((model.state_dict()[name] == 1e-5).all() for name in names)
    assert not any(".scale" in name for name in small("mambavision_t").state_dict())


def test_official_layouts():
    """Names with factors on the branches as the larger variants have them, and those of a detector's backbone."""
    official = {f"module.{key}": torch.randn(shape) for key, shape in GOLDEN["state"].items()}
    for stage, depth, channels in ((2, 8, 320), (3, 4, 640)):
        for block in range(depth):
            official |= {f"module.levels.{stage}.blocks.{block}.gamma_{i}": torch.randn(channels) for i in (1, 2)}
    model = vmamba.create_model("mambavision_t", layer_scale=1e-5)
    report = load_checkpoint(model, {"state_dict": official, "epoch": 300})
    assert report.ok and report.layout == "official"
    assert torch.equal(model.stages[3].blocks[1].scale2.gamma, official["module.levels.3.blocks.1.gamma_2"])
    halves = [official[f"module.levels.2.blocks.0.mixer.conv1d_{half}.weight"] for half in "xz"]
    assert torch.equal(model.stages[2].blocks[0].mixer.conv.weight, torch.cat(halves))

    dense = {f"backbone.{key.removeprefix('module.')}": value for key, value in official.items()}
    dense = {key: value for key, value in dense.items() if not key.startswith(("backbone.norm.", "backbone.head."))}
    for i in range(4):
        dense |= {f"backbone.outnorm{i}.{leaf}": torch.randn(80 * 2**i) for leaf in ("weight", "bias")}
    pyramid = vmamba.create_model("mambavision_t_backbone", layer_scale=1e-5)
    assert load_checkpoint(pyramid, {"state_dict": {**dense, "decode_head.conv_seg.bias": torch.ones(2)}}).ok

"""The multi-head scan: its routes, scan route attention, the published mixer, and its place in a backbone."""

import pytest
import torch

from tests import goldens
from vmamba.checkpoint import load_checkpoint
from vmamba.mixers.mhs import FOUR_HEADS, KEYS, MHS, THREE_HEADS, ScanHead, route_attention, straight
from vmamba.models.vmamba import VMamba
from vmamba.scans import diagonal, serpentine, spiral, zigzag

GOLDEN = goldens.load("op_mhs_routes")
GRIDS = [case for case in GOLDEN["cases"] if "grid" in case]
ATTENTION = [case for case in GOLDEN["cases"] if "gfu_t" in case]
LETTERS = {"C": serpentine.routes, "X": zigzag.routes, "S": spiral.routes, "Z": straight}
HEADS = {"op_mhs_block": FOUR_HEADS, "op_mhs_block_3h": THREE_HEADS}


@pytest.mark.parametrize("case", GRIDS, ids=lambda case: case["what"])
@pytest.mark.parametrize("letter", LETTERS)
def test_published_routes(case, letter):
    first, first_back, second, second_back = LETTERS[letter](*case["grid"])
    assert goldens.compare(first, case["outputs"][f"{letter}0"]) == 0
    assert goldens.compare(second, case["outputs"][f"{letter}1"]) == 0
    assert torch.equal(first_back, first.flip(0)) and torch.equal(second_back, second.flip(0))


@pytest.mark.parametrize("routes", [*LETTERS.values(), diagonal.routes])
def test_every_route_visits_every_pixel_once(routes):
    for h, w in [(h, w) for h in range(1, 8) for w in range(1, 8)]:
        assert (routes(h, w).sort(1).values == torch.arange(h * w)).all(), (h, w)


def test_diagonals_are_read_downwards():
    assert diagonal.routes(2, 3)[[0, 2]].tolist() == [[0, 1, 3, 2, 4, 5], [2, 1, 5, 0, 4, 3]]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: f"t={case['gfu_t']}")
def test_route_attention(case):
    (y,) = goldens.case_inputs(case)  # (b, k, d, l)
    out = route_attention(y.permute(0, 3, 1, 2), case["gfu_t"]).transpose(1, 2)
    assert goldens.compare(out, case["outputs"]["out"]) < 1e-12


def test_route_attention_has_gradients_where_routes_agree():
    torch.manual_seed(0)
    y = torch.randn(3, 4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(route_attention, y.clone().requires_grad_())
    y[1] = 0.5
    y.requires_grad_()
    out = route_attention(y)
    (grad,) = torch.autograd.grad(out.sum(), y)
    assert (out[1] == 0).all() and (grad[1] == 0).all() and grad.isfinite().all() and (grad[0] != 0).all()


def test_route_attention_is_a_factor_between_two_thirds_and_two():
    one_low, one_high = torch.tensor([[0.0], [1], [1], [1]]), torch.tensor([[1.0], [0], [0], [0]])
    assert route_attention(one_low).item() / 3 == pytest.approx(2 / 3, abs=1e-4)
    assert route_attention(one_high).item() == pytest.approx(2, abs=1e-4)
    assert route_attention(one_low, 0.7).item() == 0
    assert route_attention(one_high[:1]).item() == 1  # a single route


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_published_mixer(name):
    golden = goldens.load(name)
    config = golden["config"]
    mixer = MHS(config["d_model"], scan=HEADS[name], threshold=config["gfu_t"]).double()
    mixer.official_keys = KEYS
    state = {key: torch.full(shape, torch.nan) for key, shape in golden["state"].items()}  # second copies are not read
    report = load_checkpoint(mixer, state | goldens.fill_state(golden))
    assert report.ok and sorted(report.ignored) == sorted(golden["skip"])
    assert sum(p.numel() for p in mixer.parameters()) == golden["params"]
    found = {}
    for letter, head in zip("CXSZ", mixer.heads, strict=False):
        head.register_forward_hook(lambda module, inputs, y, letter=letter: found.update({letter: y}))
    mixer.join.register_forward_hook(lambda module, inputs, y: found.update(mhs=y))
    for case in golden["cases"]:
        (x,) = goldens.case_inputs({"input_scale": config["input_scale"], **case})
        outputs = {"out": mixer(x), "mhs": found.pop("mhs")}
        for letter, y in found.items():  # (b, h, w, k, d)
            outputs[f"head_{letter}.ys"] = y.flatten(1, 2).permute(0, 2, 3, 1)
            outputs[f"head_{letter}.gfu"] = route_attention(y, config["gfu_t"]).flatten(1, 2).transpose(1, 2)
        assert outputs.keys() == case["outputs"].keys()
        for key, tensor in outputs.items():
            assert goldens.compare(tensor, case["outputs"][key]) < 1e-12, key


@pytest.mark.parametrize("scan", [THREE_HEADS, FOUR_HEADS, "cross", ["raster", "diagonal", "atrous"]])
def test_in_a_backbone(scan):
    torch.manual_seed(0)
    model = VMamba(depths=(1, 1), dim=18, mixer=MHS, scan=scan, num_classes=5)
    for size in [(8, 8), (33, 45), (7, 50)]:
        model.zero_grad()
        y = model(torch.randn(2, 3, *size))
        y.square().sum().backward()
        assert y.shape == (2, 5)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiles_and_exports():
    torch.manual_seed(0)
    mixer = MHS(8, scan=THREE_HEADS, state=2).eval()
    x = torch.randn(2, 3, 5, 8)
    with torch.no_grad():
        compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, mixer(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.export.export(mixer, (x,)).module()(x), mixer(x), rtol=1e-4, atol=1e-5)
    assert mixer.to("meta")(x.to("meta")).shape == x.shape
    torch.compiler.reset()


def test_half_precision_attends_in_float32():
    head = ScanHead(4, state=2).bfloat16()
    assert head(torch.randn(1, 3, 2, 4, dtype=torch.bfloat16)).dtype == torch.float32
    mixer, x = MHS(8), torch.randn(1, 3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert (y.float() - mixer(x)).abs().max() < 0.2 * mixer(x).std() + 0.1
    assert mixer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_fewer_channels_than_heads():
    with pytest.raises(ValueError, match="3 channels cannot be shared by 4 heads"):
        MHS(3)

"""PPMA: polyline attention against the original, its two forms against each other, and the official checkpoints."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vmamba
from tests import goldens
from tests.test_polyline_mask import Sizes
from vmamba.checkpoint import fit, load_checkpoint
from vmamba.kernels.polyline_mask import log_masks, segment_sums
from vmamba.mixers import polyline
from vmamba.mixers.polyline import PolylineAttention, criss_cross, full, rotary
from vmamba.models.ppma import KEYS

GOLDEN = goldens.load("op_polyline_mask")
CASES = [case for case in GOLDEN["cases"] if case["what"].startswith("module")]
GRIDS = [(1, 1), (1, 7), (7, 1), (3, 5), (8, 2)]
FORMS = [full, criss_cross]


def heads(h, w, d=6, dtype=torch.float64, **options):
    """q, k, v (2, 3, h, w, d) and log decays (2, 3, h, w)."""
    torch.manual_seed(h * w)
    qkv = torch.randn(3, 2, 3, h, w, d, dtype=dtype, **options)
    return *qkv, *-torch.rand(2, 2, 3, h, w, dtype=dtype, **options)


def with_gradients(form, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = form(*leaves)
    return y, *torch.autograd.grad(y, leaves, y.detach().cos(), materialize_grads=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"])
@torch.no_grad()
def test_golden(case):
    mixers = nn.ModuleDict({form.__name__: PolylineAttention(32, head_dim=8, attend=form) for form in FORMS}).double()
    mixers.official_keys = KEYS
    assert load_checkpoint(mixers, goldens.fill_state(GOLDEN)).ok
    assert sum(p.numel() for p in mixers.parameters()) == GOLDEN["params"]
    x = goldens.case_inputs(case)[0].permute(0, 2, 3, 1)
    h, w = x.shape[1:3]
    sin, cos = (t.unflatten(0, (h, w)) for t in rotary(h * w, 8, x))
    found = {"rope_sin": sin, "rope_cos": cos} | {f"{name}.out": mixer(x) for name, mixer in mixers.items()}
    a, b = mixers["full"].log_decays(x)
    found["full.log_mask"] = log_masks(segment_sums(a), segment_sums(b.mT))[0].flatten(-4, -3).flatten(-2)
    a, b = mixers["criss_cross"].log_decays(x)
    found["criss_cross.row_log_mask"] = segment_sums(a).transpose(1, 2)
    found["criss_cross.col_log_mask"] = segment_sums(b.mT).transpose(1, 2)
    assert found.keys() == case["outputs"].keys()
    for name, summary in case["outputs"].items():
        assert goldens.compare(found[name], summary) < 1e-12, name


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("form", FORMS)
def test_turning_the_map_turns_the_result(form, grid):
    q, k, v, a, b = heads(*grid)
    turned = form(*(t.transpose(2, 3) for t in (q, k, v)), b.mT, a.mT).transpose(2, 3)
    torch.testing.assert_close(form(q, k, v, a, b), turned)


@pytest.mark.parametrize("grid", GRIDS)
def test_full_without_decay_is_attention(grid):
    q, k, v, a, b = heads(*grid)
    expected = F.scaled_dot_product_attention(*(t.flatten(2, 3) for t in (q, k, v)), scale=1)
    torch.testing.assert_close(full(q, k, v, 0 * a, 0 * b), expected.unflatten(2, grid))


@pytest.mark.parametrize("grid", [(1, 9), (9, 1)])
def test_the_two_forms_agree_on_a_line(grid):
    tensors = heads(*grid)
    for one, other in zip(with_gradients(full, tensors), with_gradients(criss_cross, tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_criss_cross_reaches_every_pixel_once_both_ways():
    q, k, v, a, b = heads(4, 5)
    weights = [
        (q @ k.mT + segment_sums(a)).softmax(-1),
        (q.transpose(2, 3) @ k.transpose(2, 3).mT + segment_sums(b.mT)).softmax(-1),
    ]
    row_then_column = torch.einsum("bgijl,bglik,bgkld->bgijd", *weights, v)
    column_then_row = torch.einsum("bgjik,bgkjl,bgkld->bgijd", weights[1], weights[0], v)
    torch.testing.assert_close(criss_cross(q, k, v, a, b), (row_then_column + column_then_row) / 2)


@pytest.mark.parametrize("grid", [(7, 3), (5, 6)])
def test_large_maps_are_worked_on_row_by_row(grid, monkeypatch):
    tensors = heads(*grid)
    whole = with_gradients(full, tensors)
    monkeypatch.setattr(polyline, "WHOLE", 2 * grid[0] * grid[1] ** 2)  # two rows of queries at a time
    for part, expected in zip(with_gradients(full, tensors), whole, strict=True):
        torch.testing.assert_close(part, expected)
    compiled = torch.compile(full, fullgraph=True, backend="aot_eager")
    for part, expected in zip(with_gradients(compiled, tensors), whole, strict=True):
        torch.testing.assert_close(part, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("form", FORMS)
def test_memory_grows_far_slower_than_the_square_of_the_pixels(form):
    """In training, on the meta device: the largest tensor, and all that is kept for the gradient."""
    largest, kept = [], []
    for side in (64, 128):
        storages = {}

        def keep(t, storages=storages):
            storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        leaves = [t.requires_grad_() for t in heads(side, side, dtype=torch.float32, device="meta")]
        with Sizes() as sizes:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                y = form(*leaves)
            y.sum().backward()
        largest.append(sizes.largest)
        kept.append(sum(storages.values()))
    assert kept[1] <= 4**1.5 * kept[0]
    assert largest[1] <= max(4**1.5 * largest[0], 6 * 128**3)  # 6 heads; at least a row of 128 queries
    assert largest[1] < 6 * 128**4 / 100


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@torch.no_grad()
def test_precisions(form, dtype, tolerance):
    torch.manual_seed(0)
    mixer, x = PolylineAttention(24, head_dim=8, attend=form, dtype=dtype), torch.randn(1, 6, 9, 24).to(dtype)
    y = mixer(x)
    exact = mixer.double()(x.double())
    assert y.dtype == dtype and (y - exact).norm() < tolerance * exact.norm()


def test_initial_decays():
    torch.manual_seed(0)
    mixer = PolylineAttention(512, head_dim=2)
    delta = F.softplus(mixer.dt_bias)
    assert (delta > 0.99e-3).all() and (delta < 0.101).all()
    assert delta.log().mean().item() == pytest.approx(-4.6, abs=0.3)
    assert (mixer.A_log.exp() >= 1).all() and (mixer.A_log.exp() <= 1.1).all()


@pytest.mark.parametrize("dim, head_dim", [(48, 32), (9, 3)])
def test_wrong_heads(dim, head_dim):
    with pytest.raises(ValueError, match=f"even head_dim, got dim {dim} and head_dim {head_dim}"):
        PolylineAttention(dim, head_dim=head_dim)


@pytest.mark.parametrize("name", ["ppma_tiny", "ppma_small", "ppma_base"])
def test_official_layouts(name):
    """All names of the originals, constants and counters too; the dense networks have norms in place of the head."""
    state = {key: torch.empty(shape, device="meta") for key, shape in goldens.load(name)["state"].items()}
    angles = [f"layers.{i}.Relpos.angle" for i in range(4)]
    report = fit({"models": state}, vmamba.create_model(name, device="meta"))[1]
    assert report.ok and report.ignored == angles, report
    model = vmamba.create_model(f"{name}_backbone", device="meta")
    dense = {key: t for key, t in state.items() if not key.startswith(("proj.", "norm.", "head."))}
    for i, channels in enumerate(model.channels):
        dense |= {f"outnorm{i}.{leaf}": torch.empty(channels, device="meta") for leaf in ("weight", "bias")}
    report = fit({"state_dict": {f"backbone.{key}": t for key, t in dense.items()}}, model)[1]
    assert report.ok and report.ignored == angles, report


@pytest.mark.parametrize("name, heads", [("ppma_tiny", (4, 4, 8, 16)), ("ppma_base", (5, 5, 10, 16))])
def test_published_heads(name, heads):
    model = vmamba.create_model(name, device="meta")
    assert tuple(stage.blocks[0].mixer.dt_bias.numel() for stage in model.stages) == heads


@torch.no_grad()
def test_one_pixel_stages():
    model = vmamba.create_model("ppma_tiny", depths=(1, 1, 1, 1), dims=(32, 32, 32, 32), num_classes=3).eval()
    for size in ((4, 4), (4, 33), (34, 5)):
        y = model(torch.randn(2, 3, *size))
        assert y.shape == (2, 3) and y.isfinite().all()

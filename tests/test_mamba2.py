"""Mamba-2 against the original; and the mixers with heads, Mamba-2, Mamba-3, delta rule, in a network.

``test_matrix`` has every mixer with every scan.
"""

from functools import partial

import pytest
import torch
from torch import nn

from tests import goldens
from vmamba.checkpoint import load_checkpoint
from vmamba.gated_norm import GatedRMSNorm
from vmamba.kernels.ssd_reference import reference
from vmamba.mixers.delta import DeltaMixer
from vmamba.mixers.depthwise import CausalConv, DepthwiseConv
from vmamba.mixers.mamba2 import Mamba2Mixer
from vmamba.mixers.mamba3 import Mamba3Mixer
from vmamba.models.vmamba import VMamba

MIXERS = {
    "mamba2": partial(Mamba2Mixer, state=5, head_dim=8),
    "mamba2 groups": partial(Mamba2Mixer, state=3, head_dim=4, groups=2, conv=partial(CausalConv, size=3)),
    "mamba3": partial(Mamba3Mixer, state=6, head_dim=8),
    "mamba3 mimo": partial(Mamba3Mixer, state=4, head_dim=16, rank=3, rotated=1.0, norm=GatedRMSNorm),
    "delta": partial(DeltaMixer, state=5, head_dim=8),
    "delta without decay": partial(DeltaMixer, state=4, head_dim=16, decay=False),
}
mixers = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS.keys())
traced = pytest.mark.parametrize("mixer", [MIXERS[name] for name in ("mamba2", "mamba3 mimo", "delta")])


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def network(mixer, **options):
    return VMamba(**{"depths": (1, 1), "dim": 16, "mixer": mixer, "mlp_ratio": 1.0, "num_classes": 3, **options})


def test_golden():
    golden = goldens.load("op_mamba2_block")
    block = Mamba2Mixer(32, state=16, head_dim=16, conv=CausalConv, scan="raster").double()
    report = load_checkpoint(block, goldens.fill_state(golden))
    assert report.ok and sum(p.numel() for p in block.parameters()) == golden["params"]
    for case in golden["cases"]:
        (x,) = goldens.case_inputs(case)
        assert goldens.compare(block.in_proj(x), case["outputs"]["in_proj"]) < 1e-12
        assert goldens.compare(block(x[:, None])[:, 0], case["outputs"]["out"]) < 1e-12


@mixers
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (9, 8)])
def test_every_parameter_learns_on_any_grid(mixer, grid):
    module = mixer(16, scan="cross")
    x = torch.randn(2, *grid, 16, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert y.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *module.parameters()])
    one_step = grid == (1, 1)  # no decay, no angle is seen then
    assert one_step or all(p.grad.norm() > 0 for p in module.parameters())


@mixers
def test_a_route_sees_what_comes_before_and_each_route_has_its_own_parameters(mixer):
    module = mixer(16, scan="raster").double()
    module.conv = nn.Identity()
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    changed = x.clone()
    changed[0, 1, 2] += 1
    moved = (module(changed) - module(x)).abs().amax((0, 3)).flatten() > 1e-12
    assert moved.tolist() == [False] * 6 + [True] * 6
    sizes = [sum(p.numel() for p in mixer(16, scan=scan).parameters()) for scan in ("raster", "bidirectional", "cross")]
    assert sizes[1] - sizes[0] == (sizes[2] - sizes[1]) / 2 > 0


@mixers
@torch.no_grad()
def test_half_precision(mixer):
    model, x = network(mixer).eval(), torch.randn(2, 3, 33, 47)
    exact = model.double()(x.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    pure = model.bfloat16()(x.bfloat16())
    assert pure.dtype == torch.bfloat16
    for y in mixed, pure:
        assert (y.double() - exact).norm() < 0.05 * exact.norm()


@traced
def test_compile_without_graph_breaks(mixer):
    model, x = network(mixer, depths=(1,)), torch.randn(1, 3, 21, 38)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager, traced = (step(run(x), model) for run in (model, compiled))
    for got, right in zip(traced, eager, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-5 * right.abs().max().item())


def step(y, model):
    return y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))


@traced
@torch.no_grad()
def test_export(mixer):
    model = mixer(16).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 5, 16),), dynamic_shapes=({0: batch},))
    x = torch.randn(3, 3, 5, 16)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@mixers
def test_initialisation_after_meta(mixer):
    model = network(mixer, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    model.init_weights(needs_reset=True)
    fresh = network(mixer)
    assert model.eval()(torch.randn(1, 3, 20, 33)).isfinite().all()
    for (name, got), expected in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert got.isfinite().all(), name
        slack = 9 * expected.std(unbiased=False) / expected.numel() ** 0.5
        assert abs(got.mean() - expected.mean()) <= slack, name


def test_fx():
    from timm.models._features_fx import GraphExtractNet, get_graph_node_names

    model, x = network(MIXERS["mamba2 groups"]).eval(), torch.randn(1, 3, 20, 33)
    traced = GraphExtractNet(model, [get_graph_node_names(model)[1][-1]]).eval()
    assert torch.equal(traced(x), model(x))


def test_mamba2_is_ssd_of_each_route():
    block = Mamba2Mixer(16, state=3, head_dim=8, groups=2, scan="bidirectional").double()
    x, BC = torch.randn(2, 3, 5, 32).double(), torch.randn(2, 3, 5, 2, 2, 2, 3).double()
    dt = torch.randn(2, 3, 5, 2, 4).double()
    y = block.scan_map(x, BC.flatten(3), dt.flatten(3)).flatten(1, 2)
    heads, BC, dt = x.flatten(1, 2).unflatten(-1, (2, 2, 8)), BC.flatten(1, 2), dt.flatten(1, 2).unflatten(-1, (2, 2))
    expected = 0
    for route, order in enumerate([slice(None), torch.arange(14, -1, -1)]):
        B, C = BC[:, order, route].transpose(1, 3).unbind(2)  # (b, g, l, n)
        A, D, bias = (p[route].unflatten(0, (2, 2)) for p in (-block.A_log.exp(), block.D, block.dt_bias))
        part = (t[:, order].transpose(1, 2) for t in (heads, dt[:, :, route]))
        along = reference(*part, A, B, C, D, dt_bias=bias, dt_softplus=True)[0]
        expected = expected + along.transpose(1, 2)[:, order].flatten(2)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(Mamba2Mixer, 10), r"20 inner channels \(expand 2.0 of 10\) do not divide into heads of 32"),
        (partial(Mamba2Mixer, 16, head_dim=16, groups=3), "2 heads do not divide into 3 groups"),
        (partial(Mamba3Mixer, 16, rotated=1.5), "rotated must be from 0 to 1 and rank at least 1, got 1.5 and 1"),
        (partial(DeltaMixer, 12, head_dim=16), "24 inner channels"),
        (partial(DepthwiseConv, 4, 2), "odd size, got 2"),
    ],
)
def test_wrong_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()

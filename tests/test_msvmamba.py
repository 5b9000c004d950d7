"""MSVMamba's parts against the original: the multi-scale mixer and the block of both generations."""

from functools import partial

import pytest
import torch
from torch import nn

import vmamba
from tests import goldens
from tests.parts import load_block, probe
from vmamba.checkpoint import load_checkpoint
from vmamba.mixers.ms2d import COARSE, FINE, MS2D
from vmamba.models.msvmamba import BLOCK_KEYS, V1_MIXER, V3_MIXER, MSBlock, norm_first, norm_last
from vmamba.norm import LayerNorm
from vmamba.scans import Scan

CASES = {case["name"]: case for case in goldens.load("msvmamba_ms2d")["cases"]}
TOLERANCE = 1e-10  # of an output's standard deviation; the stored figures have 13 digits


def nothing(dim, **dd):
    return nn.Identity()


class InTurn(nn.Module):
    """A norm for each branch: the first call takes the first one, the next call the next."""

    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__()
        self.parts = nn.ModuleList([LayerNorm(dim), LayerNorm(dim)])
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.parts[(self.calls - 1) % len(self.parts)](x)


def backwards(h, w):
    """(1, h * w): rows backwards."""
    return torch.arange(h * w).flip(0)[None]


def others(h, w):
    """(1, 3 * h * w): rows, columns, columns backwards: what ``backwards`` leaves to the coarse map."""
    return torch.cat([torch.arange(h * w), Scan("chained").routes(h, w)[0, h * w :]])[None]


v1, v3 = partial(V1_MIXER, state=2, rank=2), partial(V3_MIXER, state=2, rank=2)
MIXERS = {
    "v1_ms": v1,
    "v1_ms_odd": v1,
    "v1_ms_sepnorm": partial(v1, route_norm=InTurn),
    "v1_ms_nose": partial(v1, norm=nothing),
    "v2_vms_noz": partial(v3, gate=None),
    "v2_vms_noz_odd": partial(v3, gate=None),
    "v2_vms_gated": v3,
    "v2_vms_noz_full2": partial(
        v3, gate=None, branches={"fine": FINE._replace(scan=backwards), "coarse": COARSE._replace(scan=others)}
    ),
}
BLOCKS = {
    "v1_block": partial(MSBlock, mixer=v1, ffn=partial(norm_first, ratio=2)),
    "v2_block": partial(MSBlock, mixer=partial(v3, gate=None), ffn=partial(norm_last, ratio=4)),
}
KEYS = [(r"op\.out_norm(\d)\.", r"op.route_norm.parts.\1."), *BLOCK_KEYS]
CASES["v1_ms_sepnorm"]["skip"] = ["out_norm.weight", "out_norm.bias"]  # there the same tensors as out_norm0's


def error(module, case):
    (x,) = goldens.case_inputs(case)
    y = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if case["branch"] == "v2" else module(x)
    return goldens.compare(y, case["outputs"]["y"])


def test_every_case_is_covered():
    assert CASES.keys() == MIXERS.keys() | BLOCKS.keys()


@pytest.mark.parametrize("name", MIXERS)
def test_mixer(name):
    block = nn.ModuleDict({"mixer": MIXERS[name](8)})
    assert error(load_block(block, CASES[name], KEYS, prefix="op.")["mixer"], CASES[name]) < TOLERANCE


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    assert error(load_block(BLOCKS[name](8), CASES[name], KEYS), CASES[name]) < TOLERANCE


@pytest.mark.parametrize(
    "name", [name for name in goldens.names("msvmamba_*") if not name.endswith(("ms2d", "backbone"))]
)
def test_mixer_inside_networks(name):
    golden = goldens.load(name)
    model = vmamba.create_model(name, depths=(golden["config"]["depths"][0], 1)).double().eval()
    load_checkpoint(model, goldens.fill_state(golden), strict=False)
    for case in golden["cases"]:
        (image,) = goldens.case_inputs(case)
        (y,) = probe(lambda x=image: model(x), {"op": model.stages[1].blocks[0].mixer})["op"]
        summary = case["outputs"]["stage1_block0_op"]
        y = y if list(y.shape) == summary["shape"] else y.permute(0, 3, 1, 2)
        assert goldens.compare(y, summary) < TOLERANCE


def test_parameters_without_golden():
    model = vmamba.create_model("msvmamba_v3_small", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 50_216_296  # published: 50 million


def test_chained_order():
    assert Scan("chained").routes(2, 3).tolist() == [[5, 4, 3, 2, 1, 0, 0, 3, 1, 4, 2, 5, 5, 2, 4, 1, 3, 0]]


@pytest.mark.parametrize("mixer", [V1_MIXER, V3_MIXER])
@pytest.mark.parametrize("scan", ["chained", "cross", "atrous"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (1, 6)])
def test_any_scan_trains_on_any_grid(mixer, scan, grid):
    module = mixer(16, scan=scan)
    x = torch.randn(2, *grid, 16, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert y.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *module.parameters()])


def test_a_norm_of_steps_acts_before_visits_are_summed():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 6, 16)
    coarse = {"coarse": COARSE._replace(stride=1, conv=3)}
    mixer = MS2D(16, branches=coarse, route_norm=LayerNorm, norm=nothing, gate=None)
    steps = probe(lambda: mixer(x), {"norm": mixer.route_norm})["norm"]
    assert [tuple(y.shape) for y in steps] == [(1, 1, 3 * 24, 16)]


def test_three_resolutions():
    torch.manual_seed(0)
    x = torch.randn(1, 7, 5, 16)
    branches = {"fine": FINE, "coarse": COARSE, "coarser": COARSE._replace(stride=4, scan="cross")}
    mixer = MS2D(16, branches=branches)
    assert mixer.A_log.shape[0] == 1 + 1 + 4 and mixer(x).shape == x.shape
    before = mixer(x)
    with torch.no_grad():
        mixer.D[2:] += 1
    assert not torch.allclose(mixer(x), before)


def test_the_models_scan_is_that_of_the_coarse_map():
    torch.manual_seed(0)
    small = {"depths": (1, 1), "dim": 16, "num_classes": 5}
    model = vmamba.create_model("msvmamba_nano", **small).eval()
    other = vmamba.create_model("msvmamba_nano", scan="raster", **small).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 40, 52)
    assert not torch.allclose(model(x), other(x))
    assert [scan.name for scan in other.stages[0].blocks[0].mixer.scans] == ["raster", "raster"]

"""EfficientVMamba's parts against the original: atrous scan, ES2D, both blocks, and modules inside networks."""

from functools import partial

import pytest
import torch
from torch import nn

import vmamba
from tests import goldens
from tests.parts import load_block, probe
from vmamba.checkpoint import load_checkpoint
from vmamba.mixers.ss2d import SS2D
from vmamba.models.efficientvmamba import BLOCK_KEYS, EVSSBlock, InvertedResidual
from vmamba.scans import Scan

GOLDEN = goldens.load("efficientvmamba_es2d")
CASES = {case["name"]: case for case in GOLDEN["cases"]}
ES2D = partial(SS2D, scan="atrous")
TOLERANCE = 1e-10  # of an output's standard deviation; the stored figures have 13 digits


def test_every_case_is_covered():
    assert CASES.keys() == {"es2d_even", "es2d_odd", "es2d_odd_height", "evss_block", "inverted_residual"}


@pytest.mark.parametrize("size", GOLDEN["routes"])
def test_routes(size):
    h, w = map(int, size.split("x"))
    golden, scan = GOLDEN["routes"][size], Scan("atrous")
    routes = scan.routes(h, w)
    assert routes.where(routes < h * w, -1).tolist() == golden["scan"]
    steps = torch.arange(float(routes.numel())).view(1, *routes.shape, 1)
    assert scan.merge(steps, h, w).flatten().tolist() == golden["merge_of_arange"]


@pytest.mark.parametrize("name", ["es2d_even", "es2d_odd", "es2d_odd_height"])
def test_es2d(name):
    case = CASES[name]
    block = nn.ModuleDict({"mixer": ES2D(6, state=3, rank=2)})
    mixer = load_block(block, case, BLOCK_KEYS, prefix="op.")["mixer"]
    (x,) = goldens.case_inputs(case)
    seen = probe(lambda: mixer(x), {"y": mixer, "core_in": mixer.act, "core_out": mixer.norm})
    seen["core_in"] = [y.permute(0, 3, 1, 2) for y in seen["core_in"]]
    for key, summary in case["outputs"].items():
        assert goldens.compare(seen[key][0], summary) < TOLERANCE, key


def test_evss_block():
    case = CASES["evss_block"]
    block = load_block(EVSSBlock(16, mixer=partial(ES2D, state=4)), case, BLOCK_KEYS)
    (x,) = goldens.case_inputs(case)
    assert goldens.compare(block(x), case["outputs"]["y"]) < TOLERANCE


def test_inverted_residual():
    case = CASES["inverted_residual"]
    block = load_block(InvertedResidual(8), case, BLOCK_KEYS)
    (x,) = goldens.case_inputs(case)
    assert goldens.compare(block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), case["outputs"]["y"]) < TOLERANCE


@pytest.mark.parametrize("name", ["efficientvmamba_tiny", "efficientvmamba_small", "efficientvmamba_base"])
def test_first_block_of_networks(name):
    golden = goldens.load(name)
    model = vmamba.create_model(name, depths=(1,)).double().eval()
    load_checkpoint(model, goldens.fill_state(golden), strict=False)
    block = model.stages[0].blocks[0]
    for case in golden["cases"]:
        (image,) = goldens.case_inputs(case)
        seen = probe(lambda x=image: model(x), {"op": block.mixer, "conv": block.conv, "se_of_op": block.gate})
        seen["conv"] = [y.permute(0, 3, 1, 2) for y in seen["conv"]]
        for key, (y, *_) in seen.items():
            assert goldens.compare(y, case["outputs"][f"stage0_block0_{key}"]) < TOLERANCE, key


def test_published_layout():
    """The published files hold averaged weights of a distributed model: two wrappers around every name."""
    golden = goldens.load("efficientvmamba_tiny")
    state = {f"module.module.{key}": value for key, value in goldens.fill_state(golden).items()}
    report = load_checkpoint(vmamba.create_model("efficientvmamba_tiny"), {"state_dict": state, "epoch": 299})
    assert report.ok and report.layout == "official" and not report.ignored


def test_any_scan():
    torch.manual_seed(0)
    small = {"depths": (1, 1, 1), "dim": 16, "num_classes": 5}
    model = vmamba.create_model("efficientvmamba_tiny", **small).eval()
    other = vmamba.create_model("efficientvmamba_tiny", scan="cross", **small).eval()
    same = vmamba.create_model("efficientvmamba_tiny", scan=lambda h, w: Scan("atrous").routes(h, w), **small).eval()
    other.load_state_dict(model.state_dict())
    same.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 40, 52)
    assert torch.equal(model(x), same(x))
    assert not torch.allclose(model(x), other(x))

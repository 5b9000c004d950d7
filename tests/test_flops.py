"""Multiply-adds against the published figures, and each formula against a count by hand."""

import pytest
import torch
from timm.layers import RmsNorm
from torch import nn

import vmamba
from tests import goldens
from vmamba.flops import count
from vmamba.gated_norm import GatedRMSNorm
from vmamba.kernels.causal_conv1d import causal_conv1d
from vmamba.kernels.scan2d import scan2d
from vmamba.kernels.selective_scan import selective_scan
from vmamba.mixers.ss2d import SS2D
from vmamba.scans import Scan

PUBLISHED = {name: goldens.load(name).get("paper", {}).get("gflops_224_exact") for name in goldens.names("*vmamba_*")}
EINSUM_ROUNDING = {"vanilla_vmamba_tiny": -7488}  # fvcore takes einsum's cost from a text with four digits
ROUNDED = {  # G at 224 x 224, README of MzeroMiko/VMamba
    "vanilla_vmamba_small": 11.232,
    "vanilla_vmamba_base": 18.020,
    "vmamba_small_s1l20": 8.612,
    "vmamba_base_s1l20": 15.221,
}


class Call(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def total(name):
    with torch.device("meta"):
        model = vmamba.create_model(name)
    return sum(count(model, (1, 3, 224, 224)).values())


@pytest.mark.parametrize("name", [name for name, figure in PUBLISHED.items() if figure])
def test_published_figure_to_the_last_digit(name):
    assert total(name) + EINSUM_ROUNDING.get(name, 0) == round(PUBLISHED[name] * 1e9)


def test_there_are_published_figures():
    assert len([figure for figure in PUBLISHED.values() if figure]) >= 5


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_published_figure(name):
    assert round(total(name) / 1e9, 3) == ROUNDED[name]


def test_layers_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 10),
    )
    area = 2 * 5 * 4  # batch 2, map of 5 x 4
    assert count(model, (2, 3, 9, 7)) == {
        "convolutions": area * 8 * 3 * 9 + area * 8 * 9,
        "norms": 2 * area * 8 + 5 * 2 * 8,
        "pooling": area * 8,
        "matrix products": 2 * 8 * 10,
    }


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, GatedRMSNorm, RmsNorm])
def test_every_norm_is_a_norm(norm):
    assert count(norm(8), (2, 5, 4, 8)) == {"norms": 5 * 2 * 5 * 4 * 8}


def test_pooling_after_a_norm():
    assert count(Call(lambda x: torch.rms_norm(x, (8,)).mean((1, 2))), (2, 5, 4, 8)) == {"norms": 1600, "pooling": 320}


def test_counting_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert count(model, (2, 3, 5, 7)) == count(model.eval(), (2, 3, 5, 7))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model(torch.ones(1, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64


def test_selective_scan():
    b, d, length, n = 2, 6, 7, 4

    def run(u):
        return selective_scan(u, u, u.new_empty(d, n), u.new_empty(b, n, length), u.new_empty(b, n, length))

    assert count(Call(run), (b, d, length)) == {"scans": 9 * b * d * length * n + b * d * length}


def test_fused_scan_counts_as_its_parts():
    b, h, w, d, n, r = 2, 3, 5, 8, 4, 2
    scan = Scan("cross")
    k = scan.count

    def run(x):
        table = scan.table(h, w, "meta")
        projected, dt_proj = x.new_empty(b, h * w, k, r + 2 * n), x.new_empty(k, d, r)
        return scan2d(x, projected, dt_proj, x.new_empty(k, d, n), x.new_empty(k, d), x.new_empty(k, d), table)

    steps = b * k * h * w * d
    assert count(Call(run), (b, h * w, d)) == {"scans": steps * (9 * n + 1) + steps * r}


def test_causal_conv1d():
    assert count(Call(lambda x: causal_conv1d(x, x.new_empty(6, 4))), (2, 6, 7)) == {"convolutions": 2 * 6 * 7 * 4}


@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_cost_grows_with_the_area(size):
    mixer = SS2D(16, state=4)
    one, four = (sum(count(mixer, (b, *size, 16)).values()) for b in (1, 4))
    assert four == 4 * one > 0

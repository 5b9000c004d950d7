"""Every mixer with every scan on odd, tiny and oblong maps; every backbone with scans that its paper never saw."""

import inspect
import pkgutil
from importlib import import_module
from itertools import cycle

import pytest
import torch
from torch import nn

import vmamba.mixers
from tests.timm_zoo import KINDS, image, small
from vmamba.mixers.attention import SelfAttention
from vmamba.mixers.bimamba import BiMamba, SharedBiMamba
from vmamba.mixers.cascade2d import Cascade2D
from vmamba.mixers.channel import ChannelMixer
from vmamba.mixers.delta import DeltaMixer
from vmamba.mixers.hydra import Hydra
from vmamba.mixers.mamba2 import Mamba2Mixer
from vmamba.mixers.mamba3 import Mamba3Mixer
from vmamba.mixers.mambavision import MambaVisionMixer
from vmamba.mixers.matrices import LowRank
from vmamba.mixers.matrix_mixer import MatrixMixer
from vmamba.mixers.mhs import MHS
from vmamba.mixers.ms2d import MS2D
from vmamba.mixers.multi_receptive import LightSS2D, MultiReceptiveMixer, WaveletMamba
from vmamba.mixers.plainmamba import PlainMamba
from vmamba.mixers.polyline import PolylineAttention
from vmamba.mixers.ss2d import SS2D
from vmamba.mixers.ssd2d import SSD2D
from vmamba.registry import entries
from vmamba.scans import list_scans

DIM = 16
GRIDS = [(1, 1), (1, 5), (5, 3), (4, 7)]
MIXERS = {  # class -> settings that make it small; each takes dim and scan
    BiMamba: dict(state=2),
    SharedBiMamba: dict(state=2),
    Cascade2D: dict(state=2),
    DeltaMixer: dict(state=4, head_dim=8),
    Hydra: dict(state=4, head_dim=8),
    LightSS2D: {},
    MHS: dict(state=2),
    MS2D: dict(state=1),
    Mamba2Mixer: dict(state=4, head_dim=8),
    Mamba3Mixer: dict(state=4, head_dim=8),
    MambaVisionMixer: dict(state=2),
    MatrixMixer: dict(matrix=LowRank, head_dim=8),
    MultiReceptiveMixer: {},
    PlainMamba: dict(state=2),
    SS2D: dict(state=2),
    SSD2D: dict(state=2),
    WaveletMamba: {},
}
SCANLESS = {
    ChannelMixer: dict(grid=3),
    PolylineAttention: dict(head_dim=8),
    SelfAttention: dict(heads=2),
}  # mixers without an order
PARTS = {  # what mixers are made of or derive from
    "Attention",
    "Cauchy",
    "CausalConv",
    "Conv1d",
    "Dense",
    "DepthwiseConv",
    "Fixed",
    "FixedAttention",
    "FixedCauchy",
    "FixedLowRank",
    "FixedQuasiseparable",
    "FixedToeplitz",
    "Fourier",
    "GatedMixer",
    "LineConv",
    "LowRank",
    "Matrix",
    "Quasiseparable",
    "QueryKey",
    "RouteConv",
    "ScaledConv",
    "ScanHead",
    "SelectiveMixer",
    "SelectiveScans",
    "Toeplitz",
    "Vandermonde",
    "WaveletConv",
}
CASES = [(mixer, scan) for mixer in MIXERS for scan in list_scans()] + [(mixer, None) for mixer in SCANLESS]


def build(mixer, scan):
    torch.manual_seed(0)
    options = {} if scan is None else {"scan": scan}
    return stirred(mixer(DIM, **{**MIXERS, **SCANLESS}[mixer], **options))


@torch.no_grad()
def stirred(module):
    """``module`` with other weights: some start at zero, which would hide what lies behind them."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def name_of(value):
    return getattr(value, "__name__", str(value))


def test_every_mixer_is_here():
    modules = [import_module(f"vmamba.mixers.{m.name}") for m in pkgutil.iter_modules(vmamba.mixers.__path__)]
    classes = {
        thing
        for module in modules
        for name, thing in vars(module).items()
        if inspect.isclass(thing) and thing.__module__ == module.__name__ and issubclass(thing, nn.Module)
    }
    others = {cls.__name__ for cls in classes - MIXERS.keys() - SCANLESS.keys()}
    assert others == PARTS, "a mixer belongs into MIXERS (without a scan: SCANLESS), a part of one into PARTS"


@pytest.mark.parametrize(("mixer", "scan"), CASES, ids=name_of)
def test_any_scan_trains_on_any_grid(mixer, scan):
    module = build(mixer, scan)
    for grid in GRIDS:
        x = torch.randn(2, *grid, DIM, requires_grad=True)
        y = module(x)
        assert y.shape == x.shape and y.isfinite().all()
        tensors = {"x": x, **dict(module.named_parameters())}
        grads = torch.autograd.grad(y.square().sum(), tensors.values(), allow_unused=True)
        wrong = [n for n, grad in zip(tensors, grads, strict=True) if grad is None or not grad.isfinite().all()]
        assert not wrong, f"no finite gradient of {', '.join(wrong)} on {grid}"


@pytest.mark.parametrize("mixer", MIXERS, ids=name_of)
def test_the_scan_that_is_given_is_the_one_that_is_used(mixer):
    cross, turned = build(mixer, "cross").eval(), build(mixer, "rot2d").eval()
    turned.load_state_dict(cross.state_dict())
    x = torch.randn(1, 4, 5, DIM)
    assert torch.equal(cross(x), build(mixer, "cross").eval()(x))
    assert not torch.allclose(cross(x), turned(x), rtol=1e-3)


PAIRS = [*zip(MIXERS, cycle(list_scans()[::3]), strict=False), *((mixer, None) for mixer in SCANLESS)]


@pytest.mark.parametrize(("mixer", "scan"), PAIRS, ids=name_of)
@torch.no_grad()
def test_compiled_is_eager(mixer, scan):
    """Each mixer once; test_scans.py compiles each scan."""
    module = build(mixer, scan).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 3, DIM)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def other_order(h, w):
    """(2, h * w), odd pixels before even ones, and backwards: a user's scan."""
    order = torch.cat([torch.arange(1, h * w, 2), torch.arange(0, h * w, 2)])
    return torch.stack([order, order.flip(0)])


SCANNED = [name for name in KINDS if "scan" in inspect.signature(entries()[name].cls).parameters]
SCANS = ["hilbert", "local(window=3)", "chained", other_order]


@pytest.mark.parametrize("name", SCANNED)
@torch.no_grad()
def test_any_scan_in_any_backbone(name):
    x = image(1, 3, 50, 72)
    for scan in SCANS:
        y = small(name, num_classes=3, scan=scan).eval()(x)
        assert y.shape == (1, 3) and y.isfinite().all()


@pytest.mark.parametrize("name", SCANNED)
@torch.no_grad()
def test_a_backbone_reads_in_the_order_that_is_given(name):
    x = image(1, 3, 50, 72)
    cross, turned = (stirred(small(name, scan=scan)).eval() for scan in ("cross", "rot2d"))
    assert all(torch.equal(a, b) for a, b in zip(cross.parameters(), turned.parameters(), strict=True))
    assert not torch.allclose(cross(x), turned(x))


@pytest.mark.parametrize("name", SCANNED)
def test_unknown_scan_in_a_backbone(name):
    with pytest.raises(ValueError, match=r"unknown scan 'hilbrt' \(did you mean 'hilbert'"):
        small(name, device="meta", scan="hilbrt")

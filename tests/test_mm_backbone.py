"""VMambaBackbone as OpenMMLab's toolboxes expect a backbone: built by name, shapes, freezing, modes, gradients."""

import subprocess
import sys

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.registry import MODELS
from mmseg.models.backbones import TIMMBackbone
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.mm_parts import BACKBONES, DENSE, small_cfg
from tests.timm_zoo import KINDS, image, shrunk
from vmamba.flops import count
from vmamba.mm import VMambaBackbone

NAME = "vmamba_tiny_s1l8"
BATCH_NORMS = ("efficientvmamba_tiny", "mobilemamba_t2", "vcmamba_s", "vim_tiny_patch16_224")


def small(name, **options):
    """A small backbone, the same weights each time."""
    torch.manual_seed(0)
    return MODELS.build(small_cfg(name, **options))


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_shapes(name):
    model = small(name).eval()
    assert len(model.channels) == len(model.strides) and isinstance(model, VMambaBackbone)
    for height, width in ((32, 32), (31, 31), (112, 137)):
        maps = model(image(2, 3, height, width))
        assert isinstance(maps, tuple) and all(y.is_contiguous() and y.isfinite().all() for y in maps)
        assert [y.shape[:2] for y in maps] == [(2, c) for c in model.channels]
        for y, stride in zip(maps, model.strides, strict=True):  # up to a pixel of the map and a patch of the image
            assert abs(y.shape[2] * stride - height) < stride + 16 and abs(y.shape[3] * stride - width) < stride + 16


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_is_used(name):
    """Data-parallel training fails for a parameter without a gradient."""
    model = small(name, drop_path_rate=0.0).train()
    sum(y.square().mean() for y in model(image(2, 3, 96, 64))).backward()
    unused = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unused


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "mobilemamba_t2"])
def test_fewer_outputs_have_fewer_parameters(name):
    model = small(name, out_indices=[1], in_channels=5).train()
    (y,) = model(image(2, 5, 64, 64))
    y.sum().backward()
    assert y.shape[1] == model.channels[0] == 32 and len(model.pyramid.body.stages) == 2
    assert all(p.grad is not None for p in model.parameters())


def test_norms_of_outputs_are_those_of_the_paper():
    kinds = {name: [type(norm).__name__ for norm in small(name).pyramid.norms] for name in ("mobilemamba_t2", NAME)}
    assert kinds == {"mobilemamba_t2": ["Identity"] * 3, NAME: ["LayerNorm"] * 4}
    assert small("ppma_tiny").pyramid.norms[0].eps == 1e-6 and small(NAME).pyramid.norms[0].eps == 1e-5
    assert all(isinstance(norm, nn.LayerNorm) for norm in small("mobilemamba_t2", out_norm=True).pyramid.norms)
    assert not list(small(NAME, out_norm=False).pyramid.norms.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "vmamba_tini"}, ValueError, "unknown model 'vmamba_tini'; did you mean"),
        ({"variant": "vmunet"}, ValueError, "vmunet is no backbone"),
        ({"drop_path": 0.1}, TypeError, "drop_path"),
        ({"pretrained": True}, TypeError, "pretrained must be a checkpoint's path"),
        ({"pretrained": "a.pth", "init_cfg": {"type": "Pretrained", "checkpoint": "a.pth"}}, ValueError, "not both"),
        (
            {"frozen_stages": 5},
            ValueError,
            r"must be -1 \(none\) to 4 \(all of vmamba_tiny_s1l8\), got 5",
        ),
        ({"out_indices": (0, 7)}, (ValueError, AssertionError), "7"),
    ],
)
def test_constructor_errors(options, error, message):
    with pytest.raises(error, match=message):
        VMambaBackbone(**{"variant": NAME, **({} if "variant" in options else shrunk(NAME)), **options})


@pytest.mark.parametrize("name", [NAME, "vim_tiny_patch16_224", "vcmamba_s"])
def test_frozen_stages_stay_frozen_in_training(name):
    for frozen in (-1, 0, 1, 2):
        model = small(name, frozen_stages=frozen).eval().train()
        body = model.pyramid.body
        parts = [("stem", body.stem, frozen >= 0), *((f"level {i}", y, i < frozen) for i, y in enumerate(body.levels))]
        parts += [(f"norm {i}", norm, i < frozen) for i, norm in enumerate(getattr(model.pyramid, "norms", ()))]
        for part, module, expected in parts:
            assert all(p.requires_grad != expected for p in module.parameters()), (part, frozen)
            assert all(m.training != expected for m in module.modules()), (part, frozen)
        sum(y.mean() for y in model(image(2))).backward()
        assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_norm_eval(name):
    model = small(name, norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert norms and not any(m.training for m in norms) and model.pyramid.body.training
    assert any(m.training for m in small(name).train().modules() if isinstance(m, _BatchNorm))


@pytest.mark.parametrize("name", BACKBONES)
def test_checkpointing_changes_nothing(name):
    results = []
    for with_cp in (False, True):
        model = small(name, with_cp=with_cp, drop_path_rate=0.0).eval()
        maps = model(image())
        sum(y.square().mean() for y in maps).backward()
        results.append([*maps, *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_synchronised_batch_norms(name):
    """PyTorch's and mmengine's converters put in plain norms; ours see channels-last maps or have activations."""
    model = small(name, drop_path_rate=0.0).eval()
    x = image(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        synchronised = convert_sync_batchnorm(model).eval()
        assert any(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules())
        assert all(torch.allclose(y, z, atol=1e-5) for y, z in zip(synchronised(x), expected, strict=True))
        reverted = revert_sync_batchnorm(synchronised).train().eval()
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in reverted.modules())
        assert all(torch.allclose(y, z, atol=1e-5) for y, z in zip(reverted(x), expected, strict=True))


@pytest.mark.parametrize("name", [NAME, "efficientvmamba_tiny", "mobilemamba_t2", "ppma_tiny"])
def test_mmengine_counts_our_operators(name):
    model = small(name).eval()
    counter = FlopAnalyzer(model, (image(1, 3, 64, 96),)).unsupported_ops_warnings(False)
    found, expected = counter.uncalled_modules_warnings(False).by_operator(), count(model.pyramid, (1, 3, 64, 96))
    assert found["conv"] == expected["convolutions"] and found.get("scan2d", 0) == expected.get("scans", 0)
    assert not {op for op in counter.unsupported_ops() if op in ("vmamba::scan2d", "vmamba::selective_scan")}
    assert 0.9 < counter.total() / sum(expected.values()) < 1.1


@pytest.mark.parametrize("name", [NAME, "vim_tiny_patch16_224", "mobilemamba_t2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(name, dtype):
    model = small(name).train()
    with torch.autocast("cpu", dtype):
        maps = model(image(2))
    sum(y.float().mean() for y in maps).backward()
    assert all(y.isfinite().all() for y in maps) and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in KINDS if name not in DENSE])
def test_timm_backbone_of_mmseg(name):
    backbone = TIMMBackbone(name, features_only=True, pretrained=False, in_channels=3, **shrunk(name)).eval()
    with torch.no_grad():
        maps = backbone(image(1, 3, 64, 96))
    assert len(maps) >= 3 and all(y.ndim == 4 for y in maps)


def test_importing_vmamba_imports_nothing_of_openmmlab():
    code = "import sys, vmamba; print([name for name in sys.modules if name.split('.')[0] in ('mmengine', 'mmcv')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"

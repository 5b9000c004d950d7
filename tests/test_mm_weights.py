"""Weights of backbones in OpenMMLab: the files of the original code and ours, kept through initialisation."""

import os
import pickle

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint, save_checkpoint
from torch import nn

import vmamba
from tests import goldens
from tests.mm_parts import small_cfg
from tests.official_vmamba import official
from tests.timm_zoo import image, small
from vmamba.mm import VMambaBackbone, history
from vmamba.mm.official import OFFICIAL

NAME = "vmamba_tiny_s1l8"


class Detector(BaseModule):
    """A parent as mmdet has it: its ``init_weights`` walks over the children."""

    def __init__(self, backbone: dict, init_cfg=None):
        super().__init__(init_cfg)
        self.backbone = MODELS.build(backbone)
        self.head = nn.Linear(4, 4)


@pytest.fixture
def files(tmp_path):
    """A classifier and the files that hold its weights: name -> path."""
    torch.manual_seed(3)
    model = small(NAME).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    body = {key: t for key, t in official(model).items() if not key.startswith("classifier")}
    for i, c in enumerate((16, 32, 64, 128)):
        body |= {f"outnorm{i}.weight": torch.full((c,), i + 2.0), f"outnorm{i}.bias": torch.ones(c)}
    detector = {f"backbone.{key}": t for key, t in body.items()} | {"head.weight": torch.ones(4, 4)}
    contents = {
        "classifier": {"model": official(model), "epoch": 1},
        "native": model.state_dict(),
        "detector": {"state_dict": detector, "meta": {}},
        "wrapped": {"state_dict": {f"module.{key}": t for key, t in detector.items()}},
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = str(tmp_path / f"{name}.pth")
        torch.save(content, paths[name])
    return model, paths


def check_loaded(backbone, model, norms):
    with torch.no_grad():
        maps = backbone.eval().pyramid.body.forward_intermediates(image(), intermediates_only=True)
        expected = model.forward_intermediates(image(), intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(maps, expected, strict=True))
    assert [norm.weight[0].item() for norm in backbone.pyramid.norms] == norms


@pytest.mark.parametrize("kind", ["classifier", "native", "detector", "wrapped"])
@pytest.mark.parametrize("way", ["pretrained", "dict", "list"])
def test_init_cfg(files, kind, way):
    model, paths = files
    cfg = {"type": "Pretrained", "checkpoint": paths[kind]}
    trunc = {"type": "TruncNormal", "layer": "Linear", "std": 5.0}
    given = {"pretrained": {"pretrained": paths[kind]}, "dict": {"init_cfg": cfg}, "list": {"init_cfg": [trunc, cfg]}}
    parent = Detector(small_cfg(NAME, **given[way]), init_cfg={"type": "Constant", "layer": "Linear", "val": 9.0})
    parent.init_weights()
    check_loaded(parent.backbone, model, [2, 3, 4, 5] if kind in ("detector", "wrapped") else [1, 1, 1, 1])
    assert parent.head.weight.eq(9).all() and parent.backbone.is_init
    parent.backbone.init_weights()
    check_loaded(parent.backbone, model, [2, 3, 4, 5] if kind in ("detector", "wrapped") else [1, 1, 1, 1])


def test_prefix(files):
    model, paths = files
    cfg = {"type": "Pretrained", "checkpoint": paths["detector"], "prefix": "backbone."}
    backbone = MODELS.build(small_cfg(NAME, init_cfg=cfg))
    backbone.init_weights()
    check_loaded(backbone, model, [2, 3, 4, 5])
    backbone = MODELS.build(small_cfg(NAME, init_cfg={**cfg, "prefix": "encoder"}))
    with pytest.raises(ValueError, match=r"has nothing under 'encoder\.'; it has backbone\., head\."):
        backbone.init_weights()


def test_a_parent_does_not_touch_a_backbone_without_init_cfg():
    parent = Detector(small_cfg(NAME))
    before = {key: t.clone() for key, t in parent.backbone.state_dict().items()}
    parent.init_weights()
    assert all(torch.equal(t, before[key]) for key, t in parent.backbone.state_dict().items())


@pytest.mark.parametrize("kind", ["detector", "wrapped"])
def test_official_detector_by_load_from(files, kind):
    """What mmengine's runner does for ``load_from`` and for testing."""
    model, paths = files
    parent = Detector(small_cfg(NAME))
    load_checkpoint(parent, paths[kind], strict=False)
    check_loaded(parent.backbone, model, [2, 3, 4, 5])
    assert parent.head.weight.eq(1).all()


def test_ours_again(files, tmp_path):
    first, second = Detector(small_cfg(NAME)), Detector(small_cfg(NAME))
    save_checkpoint({"state_dict": first.state_dict(), "meta": {}}, str(tmp_path / "ours.pth"))
    load_checkpoint(second, str(tmp_path / "ours.pth"), strict=True)
    assert all(torch.equal(t, first.state_dict()[key]) for key, t in second.state_dict().items())
    second.load_state_dict(first.state_dict())


def test_fewer_stages_take_the_same_files(files):
    model, paths = files
    for kind in ("classifier", "detector"):
        backbone = MODELS.build(small_cfg(NAME, out_indices=(0, 1), pretrained=paths[kind]))
        backbone.init_weights()
        assert torch.equal(backbone.pyramid.body.stem.conv1.weight, model.stem.conv1.weight)


@pytest.mark.parametrize("options", [{"depths": (1, 1, 3, 1)}, {"dim": 32}, {"variant": "vmamba_tiny_s2l5"}])
def test_another_network_is_refused(files, options):
    _, paths = files
    backbone = MODELS.build(small_cfg(NAME, **options, pretrained=paths["classifier"]))
    before = {key: t.clone() for key, t in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=r"classifier\.pth: the checkpoint is not of this backbone; .*\n.*body\."):
        backbone.init_weights()
    assert all(torch.equal(t, before[key]) for key, t in backbone.state_dict().items())
    parent = Detector(small_cfg(NAME, **options))
    with pytest.raises(ValueError, match="not of this backbone"):
        load_checkpoint(parent, paths["detector"])


def test_no_such_file():
    backbone = MODELS.build(small_cfg(NAME, pretrained="nowhere.pth"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere\.pth"):
        backbone.init_weights()


def test_an_address(files, tmp_path, monkeypatch):
    """The file is fetched by PyTorch's hub, here from its cache."""
    model, paths = files
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    os.link(paths["detector"], tmp_path / "hub/checkpoints/detector.pth")
    backbone = MODELS.build(small_cfg(NAME, pretrained="https://example.org/detector.pth"))
    backbone.init_weights()
    check_loaded(backbone, model, [2, 3, 4, 5])


@pytest.mark.parametrize(
    ("type_name", "golden"),
    [
        ("MM_VSSM", "vmamba_tiny_s1l8_backbone"),
        ("Backbone_VSSM", "vmamba_tiny_s1l8_backbone"),
        ("MM_VSSM", "msvmamba_nano_backbone"),
        ("Backbone_EfficientVSSM", "efficientvmamba_tiny_backbone"),
        ("VisionMambaSeg", "vim_seg_tiny_64"),
        ("VisionMambaSeg", "vim_seg_small_64"),
    ],
)
def test_official_types_take_official_arguments_and_weights(type_name, golden):
    golden = goldens.load(golden)
    parent = Detector({"type": type_name, **golden["config"]}).double().eval()
    state = {f"backbone.{key}": value for key, value in goldens.fill_state(golden).items()}
    parent.load_state_dict({**state, **{f"head.{key}": t for key, t in parent.head.state_dict().items()}})
    case = golden["cases"][0]
    with torch.no_grad():
        maps = parent.backbone(*goldens.case_inputs(case))
    for i, y in enumerate(maps):
        assert goldens.compare(y, case["outputs"][f"out{i}"]) < 1e-5


@pytest.mark.parametrize("type_name", OFFICIAL)
def test_every_variant_of_an_official_type_is_found(type_name):
    for variant, arguments in OFFICIAL[type_name].variants.items():
        given = {key: next(iter(v)) if isinstance(v, frozenset) else v for key, v in arguments.items()}
        assert OFFICIAL[type_name].find(given) == variant


def test_official_arguments_that_no_variant_has(caplog):
    given = {"type": "MM_VSSM", "dims": 96, "depths": [2, 2, 8, 2], "ssm_ratio": 2.0}
    with pytest.raises(ValueError, match=r"has ssm_ratio=2\.0; vmamba_tiny_s1l8 has ssm_ratio=1\.0; .* VMambaBackbone"):
        MODELS.build(given)
    model = MODELS.build({**given, "ssm_ratio": 1.0, "use_checkpoint": True, "drop_path_rate": 0.3, "in_chans": 1})
    assert model.variant == NAME and model.pyramid.body.stages[0].grad_checkpointing
    assert model.pyramid.body.in_chans == 1 and isinstance(model, VMambaBackbone)
    assert model.pyramid.body.stages[3].blocks[1].drop_path.drop_prob == pytest.approx(0.3)
    vanilla = MODELS.build({"type": "MM_VSSM", "dims": 96, "depths": (2, 2, 9, 2)})
    assert vanilla.variant == "vanilla_vmamba_tiny"


def test_logs_are_read_although_mmengine_takes_its_class_off_the_list(tmp_path):
    history.register()
    torch.save({"state_dict": small(NAME).state_dict(), "logs": HistoryBuffer([1.0], [1])}, tmp_path / "a")
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(history.method, "builtins.getattr")])
    assert vmamba.load_checkpoint(small(NAME), tmp_path / "a").ok


def test_logs_in_a_checkpoint_are_read_without_running_code(tmp_path):
    history.register()
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    model = small(NAME)
    torch.save({"state_dict": model.state_dict(), "message_hub": {"log_scalars": {"loss": buffer}}}, tmp_path / "a")
    stored = torch.load(tmp_path / "a", weights_only=True)["message_hub"]["log_scalars"]["loss"]
    assert stored.mean() == 1.5 and stored.statistics("max") == 2.0
    assert vmamba.load_checkpoint(model, tmp_path / "a").ok


class Reach:
    """A pickle that asks for an attribute of a class, as a first step to run code."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


def test_attributes_are_not_reached_through_a_checkpoint(tmp_path):
    history.register()
    torch.save({"state_dict": small(NAME).state_dict(), "extra": Reach()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError, match="may not refer to the attribute '__init__'"):
        torch.load(tmp_path / "evil.pth", weights_only=True)

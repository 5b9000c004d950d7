"""Loading checkpoints: every layout in which the weights are found, and what is said when they do not fit."""

import os
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vmamba
from tests import goldens
from tests.official_vmamba import official, single_file
from vmamba.checkpoint import convert, load_checkpoint
from vmamba.heads.vmunet import load_imagenet
from vmamba.models.vmamba import VANILLA, VARIANTS, VMamba

V2 = {**VARIANTS["vmamba_tiny_s1l8"], "depths": (1, 2), "dim": 16}
V0 = {"depths": (1, 2), "dim": 16, **VANILLA}
SIZES = {"num_classes": 5}


def network(settings=V2):
    torch.manual_seed(1)
    return VMamba(**settings, **SIZES)


def scrambled(settings=V2):
    """Another network of the same settings with other weights."""
    other = network(settings)
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    return other


def assert_loads(source, settings=V2, **expected):
    model, other = network(settings), scrambled(settings)
    report = load_checkpoint(other, source)
    assert report.ok and report.loaded and sorted(report.loaded) == sorted(model.state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    for field, value in expected.items():
        assert getattr(report, field) == value, field
    return report


def test_native():
    report = assert_loads(network().state_dict(), layout="native", renamed={}, reshaped=[], ignored=[])
    assert str(report).startswith(f"native layout: {len(report.loaded)} tensors loaded (0 renamed, 0 reshaped")


@pytest.mark.parametrize("settings", [V2, V0])
@pytest.mark.parametrize("layout", [dict, single_file])
def test_official(settings, layout):
    report = assert_loads(layout(official(network(settings))), settings, layout="official")
    assert report.renamed and report.reshaped and not report.ignored
    assert f"{len(report.renamed)} renamed, {len(report.reshaped)} reshaped" in str(report)


def test_official_of_january_2024():
    assert_loads({"model": official(network(V0), legacy=True)}, V0, layout="official")


def test_january_2024_names_of_the_published_network():
    golden = goldens.load("vanilla_vmamba_tiny")
    today = {key: torch.from_numpy(np.asarray(value)).float() for key, value in goldens.fill_state(golden).items()}
    legacy = golden["legacy_keys"]
    assert len(legacy) == len(today)
    model = vmamba.create_model("vanilla_vmamba_tiny", device="meta")
    new, old = convert(today, model), convert({key: today[name] for key, name in legacy.items()}, model)
    assert new.keys() == old.keys() == model.state_dict().keys()
    assert all(new[key] is old[key] or torch.equal(new[key], old[key]) for key in new)


@pytest.mark.parametrize("envelope", ["model", "state_dict", "model_state_dict", "network_weights", "module"])
def test_envelopes(envelope):
    assert_loads({envelope: OrderedDict(official(network())), "epoch": 3, "optimizer": {"state": {}}})


def test_nested_envelopes():
    assert_loads({"state_dict": {"model": official(network())}})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("state", [official, lambda model: model.state_dict()])
def test_prefixes(prefix, state):
    assert_loads({"state_dict": {prefix + key: tensor for key, tensor in state(network()).items()}})


def test_what_lies_outside_the_backbone_is_reported():
    state = {f"backbone.{key}": tensor for key, tensor in official(network()).items()}
    assert_loads({**state, "neck.convs.0.weight": torch.ones(2)}, ignored=["neck.convs.0.weight"])


def test_counters_are_no_weights():
    extra = {"layers.0.blocks.0.op.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
    assert len(assert_loads(official(network()) | extra).ignored) == 2


def test_missing_and_renamed_batch_norm_counters():
    model = torch.nn.Sequential(OrderedDict(bn=torch.nn.BatchNorm2d(2)))
    model.official_keys = [("^norm", "bn")]
    state = {key.replace("bn", "norm"): tensor + 1 for key, tensor in model.state_dict().items()}
    assert load_checkpoint(model, state).ok and model.bn.num_batches_tracked == 1
    del state["norm.num_batches_tracked"]
    assert load_checkpoint(model, state).missing == []


def test_arrays_and_numbers():
    arrays = {key: tensor.numpy() for key, tensor in network().state_dict().items()}
    assert_loads({**arrays, "epoch": 7})


def test_other_precision_and_device_are_the_models():
    model = network().double()
    load_checkpoint(model, {key: tensor.bfloat16() for key, tensor in network().state_dict().items()})
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = {key: tensor.contiguous() for key, tensor in official(network()).items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state, "epoch": 1}, path)
    assert_loads(path)
    assert_loads(str(path))


def test_misfits_are_listed_and_nothing_is_loaded():
    state = official(network())
    del state["layers.0.blocks.0.op.A_logs"], state["classifier.head.bias"]
    state["layers.7.blocks.0.norm.weight"] = torch.zeros(3)
    state["patch_embed.0.weight"] = torch.zeros(8, 4, 3, 3)
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, state)
    message = str(error.value)
    assert message.startswith("the checkpoint does not fit VMamba; official layout: ")
    assert re.search(r"^missing: stages.0.blocks.0.mixer.A_log, head.fc.bias$", message, re.M)
    assert re.search(r"^unexpected: stages.7.blocks.0.norm1.weight$", message, re.M)
    assert re.search(r"^misshapen: stem.conv1.weight: checkpoint \(8, 4, 3, 3\), model \(8, 3, 3, 3\)$", message, re.M)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    report = load_checkpoint(model, state, strict=False)
    assert not report.ok and len(report.missing) == 2 and len(report.unexpected) == 1
    assert list(report.misshapen) == ["stem.conv1.weight"]
    assert len(report.loaded) == len(before) - 3


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"\.\.\. \(\d\d in all\)"):
        load_checkpoint(network(), {"norm.weight": torch.zeros(32)})


@pytest.mark.parametrize(
    "key, change",
    [
        ("stages.0.blocks.0.mlp.fc1.weight", lambda t: t.T),
        ("stages.0.blocks.0.mixer.dt_proj", lambda t: t.transpose(1, 2)),
        ("stages.0.blocks.0.mixer.dt_proj", lambda t: t.flatten()),
        ("stem.conv1.weight", lambda t: t.flatten(1)),
        ("head.fc.weight", lambda t: t.view(1, -1)),
        ("stages.0.blocks.0.mixer.D", lambda t: t.T),
    ],
)
def test_the_same_number_of_elements_is_not_enough(key, change):
    state = network().state_dict()
    state[key] = change(state[key])
    with pytest.raises(ValueError, match=f"misshapen: {key}"):
        load_checkpoint(network(), state)


def test_two_tensors_of_one_name():
    state = official(network())
    state["head.weight"] = state["classifier.head.weight"]
    with pytest.raises(ValueError, match=r"unexpected: head.weight$"):
        load_checkpoint(network(), state)


def test_no_tensors():
    with pytest.raises(ValueError, match="there are no tensors in the checkpoint; it holds epoch, note"):
        load_checkpoint(network(), {"epoch": 3, "note": "text"})


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing\.pth"):
        load_checkpoint(network(), tmp_path / "nothing.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x02}q\x00."])
def test_wrong_file(tmp_path, suffix, content):
    path = tmp_path / f"wrong{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"wrong.* is not a readable checkpoint: ."):
        load_checkpoint(network(), path)


def test_truncated_file(tmp_path):
    path = tmp_path / "half.pth"
    torch.save(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"half\.pth is not a readable checkpoint: ."):
        load_checkpoint(network(), path)


def test_a_file_of_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list, not a mapping of tensors"):
        load_checkpoint(network(), tmp_path / "list.pth")


class Command:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_checkpoint",)


def test_code_in_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": network().state_dict(), "config": Command()}, "evil.pth")
    with pytest.raises(ValueError, match=r"holds objects that could run code and are not loaded \(posix.mkdir\)"):
        load_checkpoint(network(), "evil.pth")
    assert not (tmp_path / "made_by_a_checkpoint").exists()


def test_pyramid_takes_a_classifier_and_a_detector(tmp_path):
    settings = {"depths": (1, 1, 2, 1), "dim": 16}
    body = vmamba.create_model("vmamba_tiny_s1l8", **settings)
    with pytest.raises(ValueError, match=r"missing: norms\.0\.weight"):
        load_checkpoint(vmamba.create_model("vmamba_tiny_s1l8_backbone", **settings), official(body))
    detector = {f"backbone.{key}": t for key, t in official(body).items() if not key.startswith("classifier")}
    for i, c in enumerate((16, 32, 64, 128)):
        detector |= {
            f"backbone.outnorm{i}.weight": torch.full((c,), i + 2.0),
            f"backbone.outnorm{i}.bias": torch.ones(c),
        }
    torch.save({"state_dict": {**detector, "rpn_head.weight": torch.ones(1)}}, tmp_path / "detector.pth")
    pyramid = vmamba.create_model("vmamba_tiny_s1l8_backbone", pretrained=tmp_path / "detector.pth", **settings)
    assert [norm.weight[0].item() for norm in pyramid.norms] == [2, 3, 4, 5]
    x = torch.randn(1, 3, 33, 64)
    with torch.no_grad():
        raw = body.eval().features(x)
        for y, norm, z in zip(raw, pyramid.norms, pyramid.eval()(x), strict=True):
            assert torch.equal(norm(y).permute(0, 3, 1, 2), z)
    load_checkpoint(pyramid, pyramid.state_dict())


def test_vmunet_starts_from_imagenet():
    golden = goldens.load("vmunet")
    expected = golden["pretrained"]
    source = {key: torch.from_numpy(goldens.fill(key, shape)) for key, shape in expected["source_state"].items()}
    model = vmamba.create_model("vmunet").double()
    ours = load_checkpoint(model, goldens.fill_state(golden)).renamed  # official VM-UNet name -> ours
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = load_imagenet(model, {"model": source})
    after = model.state_dict()
    assert len(report.loaded) == len(expected["map"]) == 208 and len(after) == 222
    filled = {ours[name]: source[key] for name, key in expected["map"].items()}
    for key, tensor in after.items():
        assert torch.equal(tensor, filled[key].view_as(tensor) if key in filled else before[key]), key
    assert sorted(report.missing) == sorted(after.keys() - filled.keys())


def test_vmunet_refuses_other_weights():
    model = vmamba.create_model("vmunet", dims=(16, 32, 64, 128))
    with pytest.raises(ValueError, match=r"not the weights of a vanilla VMamba that fits VM-UNet: .*mixer"):
        load_imagenet(model, official(vmamba.create_model("vmamba_tiny_s1l8", dim=16, depths=(2, 2, 2, 2))))
    small = vmamba.create_model("vanilla_vmamba_tiny", dim=16, depths=(2, 2, 9, 2)).state_dict()
    assert len(load_imagenet(model, small).loaded) == 208

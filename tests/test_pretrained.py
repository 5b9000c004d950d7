"""``pretrained=True``: published weights in the original layout, downloaded by timm, here from a mirror on the disk."""

import inspect
import logging

import pytest
import timm
import torch

import vmamba
from tests import goldens
from tests.official_vmamba import official, single_file
from tests.timm_zoo import KINDS, NAMES, image, shrunk, small
from vmamba.checkpoint import convert
from vmamba.models.vmamba import VMamba
from vmamba.registry import entries

NAME = "vmamba_tiny_s1l8"
PUBLISHED = [name for name in NAMES if entries()[name].weights]


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """name, options -> (the published network, options that make timm download its weights from a folder)."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def make(name, layout=official):
        model = small(name).eval()
        file = tmp_path / f"{name}.pth"
        torch.save({"model": layout(model), "epoch": 300}, file)
        return model, {"pretrained_cfg_overlay": {"url": file.as_uri()}, **shrunk(name)}

    return make


@pytest.mark.parametrize("name", [name for name in KINDS if name in PUBLISHED and entries()[name].cls is VMamba])
@pytest.mark.parametrize("layout", [official, lambda model: single_file(official(model))])
def test_pretrained(mirror, name, layout, tmp_path):
    model, options = mirror(name, layout)
    torch.manual_seed(2)
    loaded = timm.create_model(name, pretrained=True, **options).eval()
    with torch.no_grad():
        assert torch.equal(loaded(image()), model(image()))
    assert (tmp_path / "home/hub/checkpoints" / f"{name}.pth").is_file()
    assert torch.equal(vmamba.create_model(name, pretrained=True, **options).eval()(image()), model(image()))


@pytest.mark.parametrize("name", ["vcmamba_s", "msvmamba_v3_tiny"])
def test_another_family(name, tmp_path, monkeypatch):
    """From the original's names and nesting, at full size, as the golden file has them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    file, golden = tmp_path / "published.pth", goldens.load(name)
    torch.save({"model": {key: value.float() for key, value in goldens.fill_state(golden).items()}}, file)
    model = timm.create_model(name).eval()
    vmamba.load_checkpoint(model, file)
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"url": file.as_uri()}).eval()
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("num_classes", [0, 5])
def test_another_classifier(mirror, num_classes):
    model, options = mirror(NAME)
    loaded = timm.create_model(NAME, pretrained=True, num_classes=num_classes, **options).eval()
    assert loaded(image(2)).shape == (2, num_classes or model.num_features)
    assert torch.equal(loaded.forward_features(image()), model.forward_features(image()))
    assert loaded.num_classes == num_classes and loaded._model_args["num_classes"] == num_classes


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_another_number_of_channels(mirror, channels):
    model, options = mirror(NAME)
    loaded = timm.create_model(NAME, pretrained=True, in_chans=channels, **options).eval()
    first, published = loaded.stem.conv1.weight, model.stem.conv1.weight
    assert loaded.in_chans == channels and first.shape[1] == channels
    if channels == 1:
        torch.testing.assert_close(first, published.sum(1, keepdim=True))
        grey = image(1, 1)
        with torch.no_grad():
            torch.testing.assert_close(loaded(grey), model(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    rest = {key: t for key, t in loaded.state_dict().items() if not key.startswith("stem.conv1.weight")}
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in rest.items())


@pytest.mark.parametrize("cls", ["getter", "list", "hook"])
def test_features(mirror, cls):
    model, options = mirror(NAME)
    loaded = timm.create_model(
        NAME, pretrained=True, features_only=True, feature_cls=cls, out_indices=(1, 2), **options
    )
    with torch.no_grad():
        maps = loaded.eval()(image())
        expected = model.forward_intermediates(image(), [1, 2], output_fmt=loaded.output_fmt, intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(maps, expected, strict=True))
    assert loaded._traits["first_conv"] == "stem.conv1"


def test_pyramid(mirror):
    model, options = mirror(NAME)
    pyramid = vmamba.create_model(f"{NAME}_backbone", pretrained=True, out_indices=(3, 1), norm=False, **options).eval()
    with torch.no_grad():
        expected = model.forward_intermediates(image(), [1, 3], intermediates_only=True)
        assert all(torch.equal(y, z) for y, z in zip(pyramid(image()), expected, strict=True))
    assert pyramid.out_indices == (1, 3) and pyramid.channels == (32, 128) and pyramid.strides == (8, 32)


def test_a_file_in_place_of_a_url(mirror, tmp_path):
    model, options = mirror(NAME)
    del options["pretrained_cfg_overlay"]
    file = tmp_path / f"{NAME}.pth"
    by_timm = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **options).eval()
    ours = vmamba.create_model(NAME, pretrained=str(file), **options).eval()
    assert torch.equal(by_timm(image()), model(image())) and torch.equal(ours(image()), model(image()))


def test_weights_that_do_not_fit_are_refused(mirror):
    _, options = mirror(NAME)
    with pytest.raises(RuntimeError, match=r"size mismatch"):
        timm.create_model(NAME, pretrained=True, **{**options, "dim": 32})


@pytest.mark.parametrize("adapted", [{}, {"num_classes": 5}, {"features_only": True}])
def test_half_of_the_weights_is_refused_however_the_model_is_adapted(mirror, adapted):
    _, options = mirror(NAME)
    options["depths"] = (1, 1, 3, 1)
    with pytest.raises(
        ValueError, match=r"published weights do not fit VMamba; .*\nmissing: stages\.2\.blocks\.2\.norm1"
    ):
        timm.create_model(NAME, pretrained=True, **adapted, **options)


def test_no_network(mirror, tmp_path):
    _, options = mirror(NAME)
    missing = (tmp_path / "%23v2cls" / "weights.pth").as_uri()
    options["pretrained_cfg_overlay"] = {"url": missing}
    with pytest.raises(RuntimeError) as error:
        vmamba.create_model(NAME, pretrained=True, **options)
    message = str(error.value)
    assert f"cannot download the weights of {NAME} from {missing}" in message
    assert f"put the file at {tmp_path / 'home/hub/checkpoints/weights.pth'}" in message


def test_a_file_put_into_the_cache_is_used(mirror, tmp_path):
    model, options = mirror(NAME)
    cache = tmp_path / "home/hub/checkpoints"
    cache.mkdir(parents=True)
    (tmp_path / f"{NAME}.pth").rename(cache / "weights.pth")
    options["pretrained_cfg_overlay"] = {"url": (tmp_path / "nowhere" / "weights.pth").as_uri()}
    loaded = vmamba.create_model(NAME, pretrained=True, **options).eval()
    assert torch.equal(loaded(image()), model(image()))


def test_variants_without_published_weights():
    assert PUBLISHED and len(PUBLISHED) < len(NAMES)
    for name in set(NAMES) - set(PUBLISHED):
        with pytest.raises(ValueError, match=f"{name} has no published weights; give a checkpoint's path"):
            vmamba.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_have_an_address(name):
    weights = entries()[name].weights
    assert weights.url.startswith("https://") and weights.url.endswith((".pth", ".pt", ".safetensors"))
    assert timm.get_pretrained_cfg(name).url == weights.url and timm.models.is_model_pretrained(name)
    assert weights.top1 is None or 50 < weights.top1 < 100
    assert [entry.weights.url for entry in entries().values() if entry.weights].count(weights.url) == 1


@pytest.mark.parametrize("name", KINDS)
def test_filter_leaves_native_checkpoints_alone(name):
    model = small(name)
    native = model.state_dict()
    headless = {key: t for key, t in native.items() if not key.startswith("head.")}
    for state in native, headless, dict(sorted(native.items())), dict(sorted(native.items(), reverse=True)):
        for target in model, small(name, num_classes=0):
            once = convert(state, target)
            assert once.keys() == state.keys() and all(torch.equal(t, state[key]) for key, t in once.items())
            twice = convert(once, target)
            assert list(twice) == list(once)


@pytest.mark.parametrize("name", KINDS)
def test_filter_is_where_timm_models_have_it(name):
    assert inspect.getmodule(timm.models.model_entrypoint(name)).checkpoint_filter_fn is convert


def test_timm_loads_a_native_checkpoint(tmp_path, caplog):
    model = small(NAME).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "native.pth")
    with caplog.at_level(logging.WARNING):
        loaded = timm.create_model(NAME, checkpoint_path=str(tmp_path / "native.pth"), **shrunk(NAME)).eval()
    assert torch.equal(loaded(image()), model(image())) and not caplog.records

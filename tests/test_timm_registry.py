"""timm's registry and configurations: every backbone of the zoo is a timm model like any other."""

import importlib.util
import inspect

import pytest
import timm
import timm.models
import torch
from timm.models import get_model_traits, is_model, list_models, model_entrypoint

from tests.timm_zoo import KINDS, NAMES, classifiers, image, small
from vmamba.registry import entries

FIELDS = ["input_size", "crop_pct", "interpolation", "mean", "std", "first_conv", "classifier"]
ORIGIN = ["license", "origin_url", "paper_ids"]


@pytest.fixture(scope="module")
def published():
    """name -> the network at its published size, on the meta device; made once."""
    made = {}

    def make(name):
        return made.setdefault(name, timm.create_model(name, device="meta").eval())

    return make


def test_the_zoo_is_registered():
    assert len(NAMES) >= 12 and len(KINDS) >= 4
    assert set(NAMES) <= set(list_models())


@pytest.mark.parametrize("name", NAMES)
def test_entry_point(name):
    function = model_entrypoint(name)
    assert is_model(name) and function.__name__ == name
    assert inspect.signature(function).parameters["pretrained"].default is False
    module = inspect.getmodule(function)
    assert name in module.default_cfgs and name in module.__all__
    assert name in list_models(module=module.__name__.rsplit(".", 1)[-1])
    assert name not in vars(timm.models)  # timm's own models are all there: no clash
    assert importlib.util.find_spec("timm.models." + module.__name__.rsplit(".", 1)[-1]) is None


@pytest.mark.parametrize("name", NAMES)
def test_configuration(name, published):
    model, cfg = published(name), timm.get_pretrained_cfg(name)
    assert cfg is not None and cfg.architecture == name and cfg.num_classes == 1000
    assert all(getattr(cfg, field) for field in FIELDS + ORIGIN)
    assert bool(cfg.pool_size) == (model.output_fmt != "NLC")  # columns of tokens have no final map
    assert bool(cfg.url) == (entries()[name].weights is not None)
    state = model.state_dict()
    assert {f"{name}.weight" for name in (cfg.first_conv, *classifiers(model))} <= state.keys()
    assert isinstance(model.get_submodule(cfg.first_conv), torch.nn.Conv2d)
    assert model.in_chans == cfg.input_size[0] and model.num_classes == cfg.num_classes
    assert model.pretrained_cfg["architecture"] == name and model.output_fmt in ("NCHW", "NHWC", "NLC")
    assert model.head_hidden_size == model.num_features * model.head.global_pool.feat_mult()
    assert model.feature_info[-1]["num_chs"] == model.channels[-1]


@pytest.mark.parametrize("name", NAMES)
def test_published_size(name, published):
    model = published(name)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    size = model.pretrained_cfg["input_size"]
    maps = model.forward_features(torch.empty(2, *size, device="meta"))
    axes = model.output_fmt
    assert maps.ndim == len(axes) and maps.shape[axes.index("C")] == model.num_features
    if model.pretrained_cfg["pool_size"]:
        assert tuple(maps.shape[axes.index(axis)] for axis in "HW") == tuple(model.pretrained_cfg["pool_size"])
    assert model.forward_head(maps, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(maps).shape == (2, 1000)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_dtype(name, dtype):
    model = small(name, device="cpu", dtype=dtype)
    assert {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()} == {dtype}
    assert all(t.isfinite().all() for t in model.state_dict().values())
    meta = small(name, device="meta", dtype=dtype)
    assert {t.device.type for t in [*meta.parameters(), *meta.buffers()]} == {"meta"}


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_after_a_forward(name):
    model = small(name, device="meta").eval()
    x = image(2).to("meta")
    assert model(x).dtype == torch.float32
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert model.to(torch.float64)(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", KINDS)
def test_unknown_argument(name):
    with pytest.raises(TypeError, match="drop_pth_rate"):
        small(name, drop_pth_rate=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_traits_and_arguments_are_kept(name):
    model = small(name, in_chans=4, num_classes=7)
    assert get_model_traits(model) == {
        "img_size": None,
        "fixed_input_size": False,
        "first_conv": model.pretrained_cfg["first_conv"],
        "in_chans": 4,
        "num_classes": 7,
    }
    assert model._model_args.items() >= {"in_chans": 4, "num_classes": 7}.items()
    model.reset_classifier(3, "max")
    rebuilt = timm.create_model(name, **timm.models.get_model_args(model))
    assert rebuilt.num_classes == 3 and rebuilt.head.global_pool.pool_type == "max"

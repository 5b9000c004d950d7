"""Registers the zoo's backbones in timm: ``timm.create_model(name)`` works after ``import vmamba``."""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import cast

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vmamba.checkpoint import convert, fit
from vmamba.protocol import TimmModel
from vmamba.registry import Entry, entries


def register_all() -> None:
    """Make a timm entry point of every backbone, in the module of its class."""
    backbones = [entry for entry in entries().values() if entry.timm is not None]
    for module in {sys.modules[entry.cls.__module__] for entry in backbones}:
        mine = [entry for entry in backbones if entry.cls.__module__ == module.__name__]
        cfgs = generate_default_cfgs({f"{entry.name}.in1k": _cfg(entry) for entry in mine})
        vars(module).update(default_cfgs=cfgs, checkpoint_filter_fn=convert)
        for entry in mine:
            _register(entry, module)


def _cfg(entry: Entry) -> dict:
    return {
        "url": entry.weights.url if entry.weights else "",
        "num_classes": 1000,
        "input_size": (3, entry.input_size, entry.input_size),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": entry.license,
        "origin_url": entry.origin,
        "paper_ids": f"arXiv:{entry.paper}",
        **(entry.timm or {}),
    }


def _published(state: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Downloaded weights in native names, whole but for the classifier: timm is lax where that has another width."""
    native, report = fit(state, model)
    wrong = [key for key in (*report.missing, *report.unexpected) if not key.startswith("head.")]
    if wrong:
        raise ValueError(f"the published weights do not fit {type(model).__name__}; {report}")
    return native


def _register(entry: Entry, module: ModuleType) -> None:
    def build(pretrained=False, **overrides):
        settings = {**entry.settings, **overrides}
        levels = cast(type[TimmModel], entry.cls).feature_levels(settings)
        return build_model_with_cfg(
            entry.cls,
            entry.name,
            pretrained,
            pretrained_filter_fn=_published,
            feature_cfg={"out_indices": levels, "feature_cls": "getter", "flatten_sequential": True},
            **settings,
        )

    build.__name__ = build.__qualname__ = entry.name
    build.__module__ = module.__name__
    build.__doc__ = f"{entry.name} (arXiv:{entry.paper})"
    setattr(module, entry.name, register_model(build))

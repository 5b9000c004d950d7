"""The zoo: every network by name, from the tables at the end of the files in ``models/`` and ``heads/``."""

import difflib
import fnmatch
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import nn

Rename = tuple[str, "str | Callable | tuple"]


@dataclass(frozen=True)
class Weights:
    """Published weights of a variant: where they are, and the ImageNet-1k accuracy reported for them in percent."""

    url: str
    top1: float | None = None
    input_size: int = 224


@dataclass(frozen=True)
class Entry:
    """A named network: its class, the published settings, weights and origin; :func:`register` says what each is."""

    name: str
    cls: type[nn.Module]
    settings: Mapping[str, Any]
    weights: Weights | None
    paper: str
    origin: str
    license: str
    timm: Mapping[str, Any] | None
    sides: tuple[int, ...] | None = None

    @property
    def input_size(self) -> int:
        """Height and width of the images that the network is published for."""
        published = (self.timm or {}).get("input_size", (3, 224, 224))[-1]
        return self.weights.input_size if self.weights else published


_entries: dict[str, Entry] = {}


def register(
    cls: type[nn.Module],
    variants: Mapping[str, Mapping[str, Any]],
    *,
    keys: Sequence[Rename],
    weights: Mapping[str, Weights] | None = None,
    paper: str,
    origin: str,
    license: str,
    timm: Mapping[str, Any] | None = None,
    sides: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Add the ``variants`` of ``cls`` to the zoo.

    Args:
        cls: the network's class; takes every key of a variant as a keyword.
        variants: published settings by name.
        keys: renames from the official checkpoint's names to ours, in order; an empty name leaves the tensor out,
            and ``name[0]``, ``name[1]`` ... are stacked to one tensor ``name``.
        weights: published weights by name.
        paper: arXiv number. origin: where the original lives. license: of the original weights.
        timm: further fields of timm's pretrained configuration; None keeps the network out of timm's registry.
        sides: those of the images or volumes that a variant's figures are given for, by name, where they are not
            :attr:`Entry.input_size`.
    """
    cls.official_keys = keys  # pyright: ignore[reportAttributeAccessIssue]
    for name, settings in variants.items():
        if name in _entries:
            raise ValueError(f"{name!r} is registered twice, by {_entries[name].cls.__name__} and {cls.__name__}")
        weight, size = (weights or {}).get(name), (sides or {}).get(name)
        _entries[name] = Entry(name, cls, settings, weight, paper, origin, license, timm, size)


def entries() -> dict[str, Entry]:
    """All networks by name."""
    for folder in ("vmamba.models", "vmamba.heads"):
        for module in pkgutil.iter_modules(import_module(folder).__path__):
            import_module(f"{folder}.{module.name}")
    return _entries


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern, sorted; a word without wildcards matches inside names."""
    pattern = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return sorted(fnmatch.filter(entries(), pattern))


def find(name: str) -> Entry:
    """The entry of ``name``.

    Raises:
        ValueError: there is none; the message has near matches.
    """
    known = entries()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(sorted(known))}"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return known[name]


def create_model(name: str, *, pretrained: "bool | str | Path" = False, **overrides) -> nn.Module:
    """Build a network of the zoo with its published settings.

    Args:
        name: one of :func:`list_models`; with ``_backbone`` at the end of a backbone's name, the feature pyramid that
            detectors and segmentors use (:func:`vmamba.pyramid.pyramid_of`).
        pretrained: True for the published weights, or the path of a checkpoint in any known layout.
        **overrides: settings to change, such as ``num_classes=10`` or ``scan="raster"``.

    Raises:
        ValueError: the name is unknown, or there are no published weights; TypeError: an override is unknown;
        RuntimeError: the weights cannot be downloaded.
    """
    from vmamba.checkpoint import load_checkpoint

    base = name.removesuffix("_backbone")
    if base != name and name not in entries():
        from vmamba.pyramid import pyramid_of

        build = pyramid_of(find(base).cls)
        options = {key: overrides.pop(key) for key in inspect.signature(build).parameters if key in overrides}
        body: Any = create_model(base, pretrained=pretrained is True, num_classes=0, **overrides)
        model = build(body, **options)
    else:
        entry = find(name)
        if pretrained is True and entry.weights is None and "pretrained_cfg_overlay" not in overrides:
            raise ValueError(f"{name} has no published weights; give a checkpoint's path as pretrained=...")
        if entry.timm is not None:
            model = _create_timm_model(name, pretrained is True, overrides)
        else:
            model = entry.cls(**{**entry.settings, **overrides})
    if not isinstance(pretrained, bool):
        load_checkpoint(model, pretrained)
    return model


def _create_timm_model(name: str, pretrained: bool, overrides: Mapping[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, **overrides)
    except (URLError, ConnectionError, TimeoutError) as error:
        weights = find(name).weights
        url = overrides.get("pretrained_cfg_overlay", {}).get("url") or (weights.url if weights else "")
        folder = overrides.get("cache_dir") or Path(torch.hub.get_dir(), "checkpoints")
        cached = Path(folder, Path(urlparse(url).path).name)
        advice = f"put the file at {cached} by another way, or give its path as pretrained=..."
        raise RuntimeError(f"cannot download the weights of {name} from {url} ({error}); {advice}") from error

"""Loading checkpoints in the native layout or in that of the original code, strictly, with a report."""

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmamba.inert import inert

ENVELOPES = ("model", "models", "net", "state_dict", "model_state_dict", "network_weights", "module")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # put before names by DataParallel, averaging, torch.compile
PART = "backbone."  # where detectors and segmentors keep the backbone; their other tensors are ignored
PIECE = re.compile(r"\[\d+\]$")  # name[0], name[1], ... are parts of one tensor, along a first axis of their own
COUNTERS = re.compile(r"(^|\.)(total_ops|total_params|num_batches_tracked)$")  # no weights: may be missing or left over


@dataclass
class LoadReport:
    """What :func:`load_checkpoint` did: ``layout`` is "native" or "official", the rest are lists of our names."""

    layout: str = "native"
    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    reshaped: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every tensor of the model was found in its shape and nothing was left over."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        counts = f"{len(self.renamed)} renamed, {len(self.reshaped)} reshaped, {len(self.ignored)} ignored"
        lines = [f"{self.layout} layout: {len(self.loaded)} tensors loaded ({counts})"]
        wrong = [f"{k}: checkpoint {got}, model {want}" for k, (got, want) in self.misshapen.items()]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", wrong)):
            if names:
                shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
                lines.append(f"{title}: {shown}")
        return "\n".join(lines)


def load_checkpoint(model: nn.Module, source: "str | Path | Mapping", *, strict: bool = True) -> LoadReport:
    """Load weights into ``model`` from a native checkpoint or from one of the original code.

    Args:
        model: a network of the zoo.
        source: a ``.safetensors`` or torch file (read without running any code in it), or a mapping of tensors or
            arrays; envelopes such as ``{"model": ...}`` and prefixes such as ``module.`` are taken off.
        strict: raise unless every tensor of the model is found and nothing is left over.

    Returns:
        What was loaded, renamed, reshaped and ignored.

    Raises:
        FileNotFoundError: no such file; ValueError: not a checkpoint, or (``strict``) the tensors do not fit: the
            message lists missing, unexpected and misshapen names; nothing has been loaded then.
    """
    state, report = fit(source, model)
    if strict and not report.ok:
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}; {report}")
    wanted = model.state_dict()
    model.load_state_dict({key: state[key] for key in report.loaded if key in wanted}, strict=False)
    return report


def convert(state: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """``state`` in native names and shapes for ``model`` (timm's ``checkpoint_filter_fn``).

    Only counters and what lies outside a backbone are dropped, so tensors that do not fit are still found out.
    """
    return fit(state, model)[0]


def fit(source: "str | Path | Mapping", model: nn.Module) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors of ``source`` in native names and shapes for ``model``, and how they fit it; nothing is loaded.

    Raises:
        FileNotFoundError: no such file; ValueError: not a checkpoint.
    """
    report, wanted = LoadReport(), model.state_dict()
    raw, report.ignored = _unwrap(source if isinstance(source, Mapping) else read(source), wanted)
    native, report.renamed = _rename(raw, model, wanted)
    report.ignored += [key for key in raw if key not in native and key not in report.renamed]
    report.layout = "official" if report.renamed else "native"
    counters = [key for key in native if COUNTERS.search(key) and key not in wanted]
    report.ignored += counters
    native = _join({key: tensor for key, tensor in native.items() if key not in counters})
    native, left_out = _adapt(native, model)
    report.ignored += left_out
    native, report.reshaped = _reshape(native, wanted)
    for key, tensor in native.items():
        if key in wanted and tensor.shape != wanted[key].shape:
            report.misshapen[key] = tuple(tensor.shape), tuple(wanted[key].shape)
    report.unexpected = [key for key in native if key not in wanted]
    report.missing = [key for key in wanted if key not in native and not COUNTERS.search(key)]
    report.loaded = [key for key in native if key in wanted and key not in report.misshapen]
    return native, report


def read(path: "str | Path") -> Mapping:
    """The content of a checkpoint file, without executing anything in it.

    Raises:
        FileNotFoundError: no such file; ValueError: it cannot be read as a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with inert():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {_reason(path, error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a mapping of tensors")
    return content


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        try:
            with inert():
                found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:
            found = []
        if found:
            advice = "where you trust it, save its tensors alone"
            return f"it holds objects that could run code and are not loaded ({', '.join(found)}); {advice}"
        return "it is no file of torch.save or safetensors, or it is damaged"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _unwrap(source: Mapping, wanted: Mapping) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors inside envelopes and under prefixes that ``wanted`` does not have, and the names left out."""
    while envelope := next((name for name in ENVELOPES if isinstance(source.get(name), Mapping)), None):
        source = source[envelope]
    state = {k: torch.as_tensor(v) for k, v in source.items() if isinstance(v, Tensor | np.ndarray)}
    if not state:
        shown = ", ".join(map(str, list(source)[:8])) or "nothing"
        raise ValueError(f"there are no tensors in the checkpoint; it holds {shown}")
    state = {WRAPPERS.sub("", key): tensor for key, tensor in state.items()}
    if any(key.startswith(PART) for key in wanted) or not any(key.startswith(PART) for key in state):
        return state, []
    outside = [key for key in state if not key.startswith(PART)]
    return {key.removeprefix(PART): tensor for key, tensor in state.items() if key not in outside}, outside


def _rename(state: Mapping[str, Tensor], model: nn.Module, wanted: Mapping) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by our names, and what was renamed; the second of two for one name keeps its own: it is unexpected.

    What a rule gives an empty name is left out: constants that the original stores beside its weights.
    """
    native, renamed = {key: tensor for key, tensor in state.items() if key in wanted}, {}
    for key, tensor in state.items():
        name = key if key in wanted else _native_name(key, model.official_keys, wanted)
        if not name:
            continue
        name = key if name in native else name
        native[name] = tensor
        if name != key:
            renamed[key] = name
    return native, renamed


def _native_name(key: str, rules, wanted: Mapping) -> str:
    candidates = [key]
    for pattern, targets in rules:
        targets = targets if isinstance(targets, tuple) else (targets,)
        candidates = list(dict.fromkeys(re.sub(pattern, target, c) for c in candidates for target in targets))
    return next((c for c in candidates if PIECE.sub("", c) in wanted), candidates[0])


def _join(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacks ``name[0]``, ``name[1]``, ... to ``name`` where they are all there, of one shape."""
    parts: dict[str, list[str]] = {}
    for key in sorted(state):
        if PIECE.search(key):
            parts.setdefault(PIECE.sub("", key), []).append(key)
    whole = {}
    for name, keys in parts.items():
        wanted = [f"{name}[{i}]" for i in range(len(keys))]
        if set(keys) == set(wanted) and len({state[key].shape for key in keys}) == 1:
            whole[name] = torch.stack([state[key] for key in wanted])
    rest = {key: tensor for key, tensor in state.items() if PIECE.sub("", key) not in whole or key in whole}
    return {**rest, **whole}


def _adapt(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """What modules with ``adapt_checkpoint(state, prefix)`` make of the state, and the names that they leave out."""
    before = list(state)
    for prefix, module in model.named_modules():
        adapt: Callable[..., Any] | None = getattr(module, "adapt_checkpoint", None)
        state = state if adapt is None else adapt(state, f"{prefix}." if prefix else "")
    return state, [key for key in before if key not in state]


def _reshape(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors that hold the same numbers in the same order as the model's take its shape."""
    fits = [k for k, t in state.items() if k in wanted and _same(tuple(t.shape), tuple(wanted[k].shape))]
    return {k: t.reshape(wanted[k].shape) if k in fits else t for k, t in state.items()}, fits


def _same(got: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether shapes differ in axes of size 1 alone, or are (k * a, ...) and (k, a, ...), in either order."""
    short, long = sorted((got, want), key=len)
    extra = len(long) - len(short)
    ones = [n for n in short if n != 1] == [n for n in long if n != 1]
    joined = extra == 1 and short == (long[0] * long[1], *long[2:])
    return extra > 0 and (ones or joined)

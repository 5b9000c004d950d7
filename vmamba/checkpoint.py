"""Loading checkpoints in the native layout or in that of the original code, strictly, with a report."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

ENVELOPES = ("model", "state_dict", "model_state_dict", "network_weights", "module")
PREFIXES = ("module.", "_orig_mod.", "backbone.")
LEFTOVERS = re.compile(r"(^|\.)(total_ops|total_params|num_batches_tracked)$")


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
        source: a ``.safetensors`` or torch file (read without running any code in it), or a mapping of tensors;
            envelopes such as ``{"model": ...}`` and prefixes such as ``module.`` are taken off.
        strict: raise unless every tensor of the model is found and nothing is left over.

    Returns:
        What was loaded, renamed, reshaped and ignored.

    Raises:
        FileNotFoundError: no such file; ValueError: not a checkpoint, or (``strict``) the tensors do not fit: the
            message lists missing, unexpected and misshapen names.
    """
    state, report = _fit(source if isinstance(source, Mapping) else read(source), model)
    if strict and not report.ok:
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}; {report}")
    model.load_state_dict(state, strict=False)
    return report


def convert(state: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """``state`` in native names and shapes for ``model`` (timm's ``checkpoint_filter_fn``); nothing is dropped."""
    native, _ = _rename(_unwrap(state), model)
    return _reshape(native, model.state_dict())[0]


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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a mapping of tensors")
    return content


def _fit(source: Mapping, model: nn.Module) -> tuple[dict[str, Tensor], LoadReport]:
    report, wanted = LoadReport(), model.state_dict()
    raw = _unwrap(source)
    report.ignored = [key for key in raw if LEFTOVERS.search(key) and key not in wanted]
    native, report.renamed = _rename({k: v for k, v in raw.items() if k not in report.ignored}, model)
    report.layout = "official" if report.renamed else "native"
    native, report.reshaped = _reshape(native, wanted)
    for key, tensor in native.items():
        if key in wanted and tensor.shape != wanted[key].shape:
            report.misshapen[key] = tuple(tensor.shape), tuple(wanted[key].shape)
    report.unexpected = [key for key in native if key not in wanted]
    report.missing = [key for key in wanted if key not in native]
    report.loaded = [key for key in native if key in wanted and key not in report.misshapen]
    return {key: native[key] for key in report.loaded}, report


def _unwrap(source: Mapping) -> dict[str, Tensor]:
    while envelope := next((name for name in ENVELOPES if isinstance(source.get(name), Mapping)), None):
        source = source[envelope]
    state = {key: value for key, value in source.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        state = inside or state
    return state


def _rename(state: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    wanted, native, renamed = model.state_dict(), {}, {}
    for key, tensor in state.items():
        name = key if key in wanted else _native_name(key, model.official_keys, wanted)
        if name in native:
            raise ValueError(f"two tensors of the checkpoint are {name!r} here; the second is {key!r}")
        native[name] = tensor
        if name != key:
            renamed[key] = name
    return native, renamed


def _native_name(key: str, rules, wanted: Mapping) -> str:
    candidates = [key]
    for pattern, targets in rules:
        targets = targets if isinstance(targets, tuple) else (targets,)
        candidates = list(dict.fromkeys(re.sub(pattern, target, c) for c in candidates for target in targets))
    return next((c for c in candidates if c in wanted), candidates[0])


def _reshape(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the right size in another shape (1x1 convolutions, flattened projections) take the model's shape."""
    fits = [k for k, t in state.items() if k in wanted and t.shape != wanted[k].shape and _same(t, wanted[k])]
    return {k: t.reshape(wanted[k].shape) if k in fits else t for k, t in state.items()}, fits


def _same(got: Tensor, want: Tensor) -> bool:
    """Same elements in the same order: equal sizes once axes of length 1 are dropped and axes may be split or joined."""
    return got.numel() == want.numel()

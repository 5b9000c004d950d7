"""Golden figures of the original implementations: how to read them, and the weights and inputs they were made with.

``tests/golden/<name>.json.xz`` (made by ``xz -9e <name>.json``) records what an original computes in float64 and eval
mode when each parameter is ``fill(name, shape)`` and each input ``make_input(shape, seed)``: nothing random is stored.

Fields: model, source (repository and commit), paper, config, notes, state {original key: shape}, skip (keys of
``state`` that are not filled: tables, counters), params (trainable), cases. A case has ``input`` ([[shape, seed], ...])
or ``inputs`` ({name: {shape, seed, transform}}), ``options``, ``grad`` (gradients of sum(out * make_input(out.shape,
seed)) with respect to ``of``) and ``outputs`` {name: summary}; a summary holds shape, mean, std and the values at
``sample_indices`` of the flattened array.
"""

import json
import lzma
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
_NORM_WEIGHT = re.compile(r"(norm|bn|ln)[^.]*\.(\d+\.)*weight$|(^|\.)gamma")

TRANSFORMS: dict[str, Callable[[NDArray], NDArray]] = {
    "id": lambda x: x,
    "l2norm": lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True)),
    "logsigmoid": lambda x: -np.log1p(np.exp(-x)),
    "minus3": lambda x: 0.5 * x - 3,
    "neg_arange_jitter": lambda x: -np.arange(1, x.shape[-1] + 1) * np.exp(0.1 * x),
    "neg_exp": lambda x: -np.exp(0.5 * x),
    "one_plus": lambda x: 1 + 0.1 * x,
    "scale0.1": lambda x: 0.1 * x,
    "scale0.25": lambda x: 0.25 * x,
    "scale5": lambda x: 5 * x,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
}


def names(pattern: str = "*") -> list[str]:
    """Names of the stored golden files that match a glob pattern."""
    return sorted(path.name.removesuffix(".json.xz") for path in FOLDER.glob(f"{pattern}.json.xz"))


def load(name: str) -> dict[str, Any]:
    """The golden file ``name``; raises FileNotFoundError if it is not stored."""
    with lzma.open(FOLDER / f"{name}.json.xz", "rt") as file:
        return json.load(file)


def fill(name: str, shape: Sequence[int]) -> NDArray:
    """Values of the parameter or buffer ``name`` of ``shape``, float64; the scale depends on name and shape only."""
    shape = tuple(int(s) for s in shape)
    noise = _generator(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if re.search(r"A(_b)?_logs?$|A_c_logs?$|A_logs?\d*$", leaf):
        states = np.arange(1, (shape[-1] if len(shape) > 1 else 1) + 1, dtype=np.float64)
        return np.log(states) + 0.1 * noise
    if leaf in ("D", "Ds", "D_b", "running_mean_") or re.fullmatch(r"Ds?\d*", leaf):
        return 1.0 + 0.1 * noise
    if leaf == "running_var":
        return 1.0 + 0.1 * np.abs(noise)
    if re.search(r"dt_(proj|projs|bias)[\w.]*bias$|dt_bias$", name):
        return -3.0 + 0.5 * noise
    if len(shape) == 1 and (leaf == "weight" or _NORM_WEIGHT.search(name)):
        return 1.0 + 0.1 * noise
    if len(shape) >= 2 and leaf not in ("pos_embed", "cls_token"):
        return noise / np.sqrt(max(int(np.prod(shape[1:])), 1))
    return 0.1 * noise


def fill_state(golden: Mapping[str, Any]) -> dict[str, Tensor]:
    """The filled checkpoint of a golden file (or of one of its cases): {original key: float64 tensor}."""
    skip = set(golden.get("skip", ()))
    return {k: torch.from_numpy(np.asarray(fill(k, s))) for k, s in golden["state"].items() if k not in skip}


def second_copies(golden: Mapping[str, Any]) -> dict[str, Tensor]:
    """NaN under each key that shares another key's tensor (``tied``), which loading must leave out."""
    aliases = [k for k in golden.get("skip", ()) if any(re.search(rule, k) for rule, _ in golden.get("tied", ()))]
    return {k: torch.full(golden["state"][k], torch.nan) for k in aliases}


def make_input(shape: Sequence[int], seed: int) -> NDArray:
    """A smooth, image-like float64 array of ``shape`` with values of order one."""
    x = _generator(seed).standard_normal(tuple(shape))
    for axis in range(2, len(shape)):
        x = 0.5 * x + 0.5 * np.roll(x, 1, axis)
    return x


def case_inputs(case: Mapping[str, Any]) -> list[Tensor]:
    """The positional inputs of a case, float64, scaled by its ``input_scale``."""
    scale = case.get("input_scale", 1)
    return [torch.from_numpy(scale * make_input(shape, seed)) for shape, seed in case["input"]]


def named_inputs(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The named inputs of an operator's case, transformed, float64."""
    return {
        name: torch.from_numpy(TRANSFORMS[i["transform"]](make_input(i["shape"], i["seed"])))
        for name, i in case["inputs"].items()
    }


def sample_indices(size: int, count: int = 64) -> NDArray:
    """Indices of the flattened output whose values a summary holds."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64))


def compare(array: ArrayLike | Tensor, summary: Mapping[str, Any]) -> float:
    """Largest error of ``array`` against a summary, relative to the summary's std; inf for a wrong shape or a NaN."""
    if isinstance(array, Tensor):
        array = array.detach().cpu().double().numpy()
    got = np.asarray(array, dtype=np.float64)
    if list(got.shape) != list(summary["shape"]) or not np.isfinite(got).all():
        return float("inf")
    flat = got.reshape(-1)
    samples = np.abs(flat[sample_indices(flat.size)] - np.array(summary["samples"])).max()
    moments = abs(flat.mean() - summary["mean"]), abs(flat.std() - summary["std"])
    return float(max(samples, *moments) / max(summary["std"], 1e-12))


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))

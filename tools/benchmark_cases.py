"""The operators that ``vmamba benchmark operators`` times: what they take, random inputs of it, and published shapes.

A case is a tuple of numbers, the batch first; inputs are in the type asked for, parameters in float32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.mixers.ss2d import SS2D
from vmamba.scans import Scan

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Operator:
    """``inputs(*case, dtype, device)`` gives an implementation's arguments; ``letters`` name a case's numbers."""

    letters: str
    inputs: Callable[..., Inputs]
    cases: Mapping[str, tuple[int, ...]]

    def steps(self, case: Sequence[int]) -> int:
        """Length of the sequences of a case: l, or the pixels of a map."""
        return math.prod(n for letter, n in zip(self.letters.split(", "), case, strict=True) if letter in "lhw")


def _random(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    def normal(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(size, device=device).mul_(scale).add_(shift).to(dtype)

    return normal


def _selective_scan(b, k, steps, d, n, dtype, device) -> Inputs:
    maps, weights = _random(dtype, device), _random(torch.float32, device)
    u, delta = maps(b, k, steps, d), maps(b, k, steps, d, scale=0.5)
    B, C = maps(b, k, steps, n), maps(b, k, steps, n)
    A, D, bias = -weights(k, d, n, scale=0.5).exp(), weights(k, d), weights(k, d, scale=0.5, shift=-3.0)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": bias}


def _scan2d(b, h, w, d, n, dtype, device) -> Inputs:
    maps, weights = _random(dtype, device), _random(torch.float32, device)
    k, r = 4, math.ceil(d / 16)
    tensors = {"x": maps(b, h * w, d), "projected": maps(b, h * w, k, r + 2 * n)}
    dt_proj, A = weights(k, d, r, scale=r**-0.5), -weights(k, d, n, scale=0.5).exp()
    D, bias = weights(k, d), weights(k, d, scale=0.5, shift=-3.0)
    return {**tensors, "dt_proj": dt_proj, "A": A, "D": D, "bias": bias, "table": Scan("cross").table(h, w, device)}


def _ss2d(b, h, w, c, dtype, device) -> Inputs:
    module = partial(SS2D, state=1, expand=1.0, conv_bias=False, gate=None)
    return {"x": _random(dtype, device)(b, h, w, c), "module": module(c, device=device)}


def _causal_conv1d(b, d, steps, w, dtype, device) -> Inputs:
    weights = partial(_random(torch.float32, device), scale=0.5)
    return {"x": _random(dtype, device)(b, d, steps), "weight": weights(d, w), "bias": weights(d)}


def _ssd(b, k, steps, m, p, n, dtype, device) -> Inputs:
    maps, weights = _random(dtype, device), _random(torch.float32, device)
    dt = F.softplus(weights(b, k, steps, m, shift=-3.0)).to(dtype)
    B, C, D = maps(b, k, steps, n, scale=n**-0.5), maps(b, k, steps, n), weights(k, m)
    return {"x": maps(b, k, steps, m, p), "dt": dt, "A": -weights(k, m, scale=0.5).exp(), "B": B, "C": C, "D": D}


def _delta_rule(b, m, steps, n, p, dtype, device) -> Inputs:
    maps, weights = _random(dtype, device), _random(torch.float32, device)
    q, k = (F.normalize(maps(b, m, steps, n), dim=-1) for _ in range(2))
    beta, g = maps(b, m, steps).sigmoid(), F.logsigmoid(weights(b, m, steps, shift=3.0))
    return {"q": q, "k": k, "v": maps(b, m, steps, p), "beta": beta, "g": g}


def _layer_norm(b, p, c, dtype, device) -> Inputs:
    weights = _random(torch.float32, device)
    return {"x": _random(dtype, device)(b, p, c), "weight": weights(c), "bias": weights(c)}


def _instance_norm(b, c, d, h, w, dtype, device) -> Inputs:
    maps, weights = _random(dtype, device), _random(torch.float32, device)
    return {"x": maps(b, c, d, h, w), "residual": maps(b, c, d, h, w), "weight": weights(c), "bias": weights(c)}


STAGES = {f"VMamba-T stage {i + 1}": (128, 56 >> i, 56 >> i, 96 << i) for i in range(4)}
STAGES["VMamba-T stage 1 at 1024"] = (4, 256, 256, 96)
STATES = {"Vanilla-VMamba stage 1": (8, 56, 56, 192, 16), "VM-UNet stage 1, one image": (1, 64, 64, 192, 16)}
SEQUENCES = {
    "VMamba-T stage 1": (128, 4, 3136, 96, 1),
    "VMamba-T stage 3": (128, 4, 196, 384, 1),
    "Vim-Ti 224": (128, 1, 197, 384, 16),
    "Vim-Ti 1248": (8, 1, 6085, 384, 16),
    "VMamba-T stage 1 at 1024": (4, 4, 65536, 96, 1),
    "Vanilla-VMamba stage 1": (8, 4, 3136, 192, 16),
}
FILTERS = {"Vim-Ti 224": (128, 384, 197, 4), "Vim-Ti 1248": (8, 384, 6085, 4)}
DUALITY = {
    "VMamba-T m2 stage 1": (128, 4, 3136, 6, 16, 64),
    "VMamba-T m2 stage 3": (128, 4, 196, 24, 16, 64),
    "Mamba-2 130M": (8, 1, 2048, 24, 64, 128),
}
VOLUMES = {
    "U-Mamba 3D stage 1": (2, 32, 40, 224, 192),
    "U-Mamba 3D stage 2": (2, 64, 40, 112, 96),
    "U-Mamba 3D stage 3": (2, 128, 20, 56, 48),
    "U-Mamba 3D stage 4": (2, 256, 10, 28, 24),
    "U-Mamba 3D stage 6": (2, 320, 5, 7, 6),
}
DELTA = {"16 heads of 128": (4, 16, 2048, 128, 128), "8 heads of 64": (8, 8, 1024, 64, 64)}

OPERATORS = {
    "scan2d": Operator("b, h, w, d, n", _scan2d, {name: (*case, 1) for name, case in STAGES.items()} | STATES),
    "ss2d": Operator("b, h, w, c", _ss2d, STAGES),
    "selective_scan": Operator("b, k, l, d, n", _selective_scan, SEQUENCES),
    "ssd": Operator("b, k, l, m, p, n", _ssd, DUALITY),
    "causal_conv1d": Operator("b, d, l, w", _causal_conv1d, FILTERS),
    "layer_norm": Operator("b, p, c", _layer_norm, {s: (b, h * w, c) for s, (b, h, w, c) in STAGES.items()}),
    "instance_norm": Operator("b, c, d, h, w", _instance_norm, VOLUMES),
    "delta_rule": Operator("b, m, l, n, p", _delta_rule, DELTA),
}

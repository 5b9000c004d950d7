"""Implementations of the operators in ``benchmark_cases``: our backends, and what other packages offer for the same.

Those of other packages are imported when they are called, in the layout that they ask for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.kernels.backends import available, choose
from vmamba.kernels.causal_conv1d import causal_conv1d
from vmamba.kernels.delta_rule import delta_rule
from vmamba.kernels.delta_rule_reference import reference as delta_rule_reference
from vmamba.kernels.instance_norm import instance_norm
from vmamba.kernels.scan2d import scan2d
from vmamba.kernels.selective_scan import route_scan
from vmamba.kernels.ssd import ssd
from vmamba.kernels.ssd_reference import reference as ssd_reference
from vmamba.mixers.ss2d import SS2D
from vmamba.norm import EPS


@dataclass(frozen=True)
class Way:
    """``call(**inputs) -> y``; with ``arrange`` the inputs are laid out first, which is not timed.

    restore: y and our inputs -> y as ours, to compare. module: what must be importable.
    backend: the name under which ``kernels.backends`` knows it. loops: Python runs once per step of a sequence.
    """

    call: Callable[..., Any]
    arrange: Callable[..., dict[str, Any]] = dict
    restore: Callable[[Tensor, dict[str, Any]], Tensor] = lambda y, inputs: y
    module: str = ""
    backend: str = ""
    loops: bool = False

    @property
    def installed(self) -> bool:
        """Whether its module can be found."""
        return not self.module or find_spec(self.module) is not None


def _backends(operator: str, call: Callable[..., Any], loops: str = "") -> dict[str, Way]:
    return {name: Way(partial(call, backend=name), backend=name, loops=name == loops) for name in available(operator)}


def _run_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return choose("layer_norm", backend, x, weight, bias).forward(x, weight, bias, EPS, x.dtype)


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)


def _run_ss2d(x: Tensor, module: SS2D) -> Tensor:
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
        return module(x)


def _torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(x, weight[:, None].to(x.dtype), bias.to(x.dtype), groups=len(weight)))


def _dao_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

    return causal_conv1d_fn(x, weight, bias, activation="silu")


def _mamba_scan(**inputs: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

    return selective_scan_fn(**inputs, delta_softplus=True)


def _to_mamba_scan(u, delta, A, B, C, D, delta_bias) -> dict[str, Tensor]:
    u, delta = (t.transpose(2, 3).flatten(1, 2) for t in (u, delta))  # (b, k d, l)
    A, D, delta_bias = (t.flatten(0, 1) for t in (A, D, delta_bias))
    return {"u": u, "delta": delta, "A": A, "B": B.mT, "C": C.mT, "D": D, "delta_bias": delta_bias}


def _mamba_ssd(**inputs: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]

    return mamba_chunk_scan_combined(**inputs, chunk_size=256)


def _to_mamba_ssd(x, dt, A, B, C, D) -> dict[str, Tensor]:
    x, dt = (t.transpose(1, 2).flatten(2, 3) for t in (x, dt))  # (b, l, k m, p), (b, l, k m)
    return {"x": x, "dt": dt, "A": A.flatten(), "B": B.transpose(1, 2), "C": C.transpose(1, 2), "D": D.flatten()}


def _fla_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    m = x.shape[2] // B.shape[2]
    q, k = (t.repeat_interleave(m, 2) for t in (C, B))  # (b, l, k m, n)
    return chunk_simple_gla(q, k, x * dt[..., None], dt * A, scale=1.0)[0] + x * D[:, None]


def _fla_delta_rule(**inputs: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    return chunk_gated_delta_rule(**inputs)[0]


def _from_mamba_scan(y: Tensor, inputs: dict[str, Any]) -> Tensor:
    return y.unflatten(1, (inputs["u"].shape[1], -1)).transpose(2, 3)


def _from_heads(y: Tensor, inputs: dict[str, Any]) -> Tensor:
    return y.unflatten(2, (inputs["x"].shape[1], -1)).transpose(1, 2)


def _steps_first(**inputs: Tensor) -> dict[str, Tensor]:
    return {name: t.transpose(1, 2) for name, t in inputs.items()}


WAYS: dict[str, dict[str, Way]] = {
    "scan2d": _backends("scan2d", scan2d, loops="reference"),
    "ss2d": {"vmamba": Way(_run_ss2d)},
    "selective_scan": {
        **_backends("selective_scan", partial(route_scan, delta_softplus=True), loops="reference"),
        "mamba-ssm": Way(_mamba_scan, _to_mamba_scan, _from_mamba_scan, "mamba_ssm"),
    },
    "ssd": {
        "vmamba": Way(ssd),
        "reference": Way(lambda **inputs: ssd_reference(**inputs)[0], loops=True),
        "mamba-ssm": Way(_mamba_ssd, _to_mamba_ssd, _from_heads, "mamba_ssm"),
        "fla": Way(_fla_ssd, _to_mamba_ssd, _from_heads, "fla"),
    },
    "causal_conv1d": {
        **_backends("causal_conv1d", partial(causal_conv1d, activation="silu")),
        "torch": Way(_torch_conv1d),
        "causal-conv1d": Way(_dao_conv1d, module="causal_conv1d"),
    },
    "layer_norm": {**_backends("layer_norm", _run_layer_norm), "torch": Way(_torch_layer_norm)},
    "instance_norm": _backends("instance_norm", partial(instance_norm, slope=0.01)),
    "delta_rule": {
        "vmamba": Way(delta_rule),
        "reference": Way(lambda **inputs: delta_rule_reference(**inputs)[0], loops=True),
        "fla": Way(_fla_delta_rule, _steps_first, lambda y, inputs: y.transpose(1, 2), "fla"),
    },
}

"""Multiply-adds of a network for one input, found from shapes alone (meta device): nothing is computed.

The convention is the one in which VMamba's figures are published (arXiv:2401.10166), and gives them exactly:

- matrix products and convolutions: 1 per multiply-add; a bias is free;
- a selective scan of l steps over d channels with n states: 9 l d n, and l d for the skip D u;
- norms: 5 per element (batch norm, which inference folds into scale and shift: 2); pooling by mean: 1 per element;
- activations, sums, gathers: free. State-space duality counts as the matrix products it is evaluated by.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vmamba.kernels import causal_conv1d, scan2d, selective_scan

CONVENTION = "1 per multiply-add, 9 l d n + l d per selective scan, 5 per normalised element"
OPERATORS = causal_conv1d, scan2d, selective_scan  # imported so that torch.ops.vmamba has them

Formulas = Mapping[Any, tuple[str, Callable[..., int]]]  # operator -> kind and formula

aten, ours = torch.ops.aten, torch.ops.vmamba


@contextmanager
def _operators_as_called() -> Iterator[None]:
    """Deterministic algorithms and inference mode put other operators in the place of some, such as resizing."""
    on, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn)


def count(model: nn.Module, shape: Sequence[int], *, also: "Formulas | None" = None) -> dict[str, int]:
    """Multiply-adds of ``model(x)`` for an x of ``shape``, (b, c, h, w), by kind of operation; their sum is the total.

    The model may be on any device; neither it nor its buffers change. Keys: ``matrix products``, ``convolutions``,
    ``scans``, ``norms``, ``pooling``, ``attention``; those that occur, and the kinds of ``also``: operators that are
    free otherwise, with their kind and formula.

    Raises:
        ValueError: whatever the model raises for an input of that shape.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    table = {**FORMULAS, **(also or {})}
    formulas = {op: _doubled(formula) for op, (_, formula) in table.items()}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with _operators_as_called(), counter, _RMSNorms(), torch.no_grad():
        on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
        functional_call(model, on_meta, (torch.empty(tuple(shape), device="meta", dtype=dtype),))
    kinds: dict[str, int] = {}
    for op, flops in counter.get_flop_counts()["Global"].items():
        kind = table[op][0] if op in table else BUILT_IN.get(op, "attention")
        kinds[kind] = kinds.get(kind, 0) + flops // 2
    return kinds


class _RMSNorms(TorchFunctionMode):
    """Counts an RMS norm as a layer norm: PyTorch computes it in parts that do not tell what they are of."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = _layer_norm if func in (F.rms_norm, torch.rms_norm) else func
        return func(*args, **(kwargs or {}))


def _layer_norm(input: Tensor, normalized_shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return F.layer_norm(input, normalized_shape, weight)


def _scan(u, delta, A, *rest, out_shape=None) -> int:
    return math.prod(u) * (9 * A[-1] + 1)  # u (b, k, l, d)


def _scan2d(x, projected, dt_proj, A, D, bias, routes, *rest, out_shape=None) -> int:
    k, d, n = A
    return x[0] * routes[1] * k * d * (9 * n + 1 + dt_proj[-1])


def _conv1d(x, weight, *rest, out_shape=None) -> int:
    return math.prod(x) * weight[-1]


def _per_element(cost: int) -> Callable[..., int]:
    return lambda x, *rest, out_shape=None, **options: cost * math.prod(x)


def _doubled(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, **options: 2 * formula(*args, **options)  # the counter counts a multiply-add as two


FORMULAS = {
    ours.selective_scan: ("scans", _scan),
    ours.scan2d: ("scans", _scan2d),
    ours.causal_conv1d: ("convolutions", _conv1d),
    aten.native_layer_norm: ("norms", _per_element(5)),
    aten.native_group_norm: ("norms", _per_element(5)),
    aten.native_batch_norm: ("norms", _per_element(2)),
    aten._native_batch_norm_legit: ("norms", _per_element(2)),
    aten._native_batch_norm_legit_no_training: ("norms", _per_element(2)),
    aten.mean: ("pooling", _per_element(1)),
    aten._adaptive_avg_pool2d: ("pooling", _per_element(1)),
}
BUILT_IN = {
    **dict.fromkeys((aten.mm, aten.addmm, aten.bmm, aten.baddbmm), "matrix products"),
    **dict.fromkeys((aten.convolution, aten._convolution), "convolutions"),
}

"""Multiply-adds of our operators in mmengine's counter, on which ``get_flops.py`` of mmdet and mmseg is built."""

from collections.abc import Callable
from typing import Any

from mmengine.analysis import complexity_analysis

from vmamba.flops import FORMULAS


def register() -> None:
    """Add the operators of ``vmamba.flops`` to those that mmengine counts: 1 per multiply-add, as its own."""
    formulas = {op._qualified_op_name: formula for op, (_, formula) in FORMULAS.items()}
    ours = {name: _handle(formula) for name, formula in formulas.items() if name.startswith("vmamba::")}
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(ours)


def _handle(formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
    def count(inputs: list[Any], outputs: list[Any]) -> int:
        return formula(*map(_shape, inputs), out_shape=_shape(outputs[0]))

    return count


def _shape(value: Any) -> "tuple[int, ...] | None":
    """Shape of a tensor in a traced graph; None for anything else."""
    return tuple(value.type().sizes()) if value.isCompleteTensor() else None

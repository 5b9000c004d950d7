"""The jobs of ``vmamba benchmark operators``: each case by every implementation that can run here, results compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vmamba import memory
from vmamba.benchmark import Job, Work
from vmamba.errors import UserError
from vmamba.kernels.backends import why_not
from vmamba.tools.benchmark_cases import OPERATORS, Inputs
from vmamba.tools.benchmark_ways import WAYS, Way

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TASKS = ("forward", "forward + backward")
KEY = ("operator", "case", "task", "name")
NAMES = tuple(dict.fromkeys(name for ways in WAYS.values() for name in ways))
LOOP = 4096  # steps up to which implementations that loop in Python are timed unasked
ALIKE = 0.02  # relative norm of the difference between two results, about five times bfloat16's rounding


@dataclass(frozen=True)
class Setting:
    """What holds for every row of a run; ``batch`` replaces that of each case, ``names`` are the implementations."""

    device: torch.device
    precision: str = "bf16"
    batch: int | None = None
    names: tuple[str, ...] = ()

    def facts(self) -> dict[str, str]:
        """In words."""
        return {
            "precision": f"{self.precision} inputs, float32 parameters",
            "mode": "eager",
            "batch": "as published" if self.batch is None else str(self.batch),
            "moved": "of arguments, results and gradients, each read or written once",
        }


def points(operators: Sequence[str], tasks: Sequence[str], setting: Setting) -> Iterator[list[Job]]:
    """For each case and task the jobs that take turns.

    Raises:
        UserError: an operator is unknown.
    """
    for operator in operators:
        if operator not in OPERATORS:
            raise UserError(f"unknown operator {operator!r}; choose from {', '.join(OPERATORS)}")
    for operator in operators:
        for what, (batch, *rest) in OPERATORS[operator].cases.items():
            case = setting.batch or batch, *rest
            for task in tasks:
                yield list(_jobs(operator, what, case, task, setting))


def _jobs(operator: str, what: str, case: Sequence[int], task: str, setting: Setting) -> Iterator[Job]:
    dtype = DTYPES[setting.precision]
    inputs = cache(partial(OPERATORS[operator].inputs, *case, dtype=dtype, device=setting.device))
    agree, letters = Agreement(), OPERATORS[operator].letters
    for name, way in WAYS[operator].items():
        if name in setting.names if setting.names else _able(operator, way, case, setting):
            numbers = ", ".join(map(str, case))
            facts = {"operator": operator, "case": what, "letters": letters, "numbers": numbers, "task": task}
            yield Job({**facts, "name": name}, partial(_make, name, way, inputs, agree, task))


def _able(operator: str, way: Way, case: Sequence[int], setting: Setting) -> bool:
    """Whether an implementation that was not asked for by name can run: those that cannot are left out."""
    if way.loops and OPERATORS[operator].steps(case) > LOOP:
        return False
    if not way.backend:
        return way.installed
    with FakeTensorMode():
        fake = OPERATORS[operator].inputs(*case, dtype=DTYPES[setting.precision], device=setting.device)
    tensors = [value for value in fake.values() if isinstance(value, Tensor)]
    return why_not(operator, way.backend, *tensors) is None


def _make(name: str, way: Way, inputs: Callable[[], Inputs], agree: "Agreement", task: str) -> Work:
    given = {key: _leaf(value) for key, value in way.arrange(**inputs()).items()}
    leaves = [leaf for value in given.values() for leaf in _parameters(value)]
    call = partial(way.call, **given)
    with torch.no_grad():
        y = call()
        agree(name, way.restore(y, inputs()))
    gradient = torch.randn_like(y)
    held = memory.size_of(leaves)
    once = held + memory.size_of([y])
    if task == TASKS[0]:
        return Work(torch.no_grad()(call), held, partial(_known, once))
    return Work(partial(_both, call, leaves, gradient), held, partial(_known, 2 * once + held))


def _known(moved: int, step: Callable[[], Any]) -> int:
    step()
    return moved


def _both(call: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(call(), leaves, gradient, allow_unused=True)


def _leaf(value: Any) -> Any:
    """Tensors as leaves of their own that take gradients; what else there is as it is."""
    return value.detach().contiguous().requires_grad_() if isinstance(value, Tensor) else value


def _parameters(value: Any) -> list[Tensor]:
    return list(value.parameters()) if isinstance(value, nn.Module) else [value] if isinstance(value, Tensor) else []


class Agreement:
    """Called with each implementation's result of one case; refuses those that differ from the first."""

    def __init__(self):
        self.name, self.first = "", torch.empty(0)

    def __call__(self, name: str, y: Tensor) -> None:
        """Raises ValueError where ``y`` is not what the first was."""
        if not self.name:
            self.name, self.first = name, y.float()
            return
        difference = float((y.float() - self.first).norm() / self.first.norm())
        if not difference < ALIKE:
            raise ValueError(f"its result differs from that of {self.name} by {difference:.1e} of the norm")

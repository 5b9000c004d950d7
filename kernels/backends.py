"""Which implementation of an operator runs: an explicit choice, or the first that can take the tensors.

An operator ``op`` has one module per backend, ``vmamba.kernels.<op>_<backend>``, with a function
``why_not(*tensors) -> str | None``: None where it can take these tensors, else the reason in plain words.

Precedence: the ``backend=`` argument, ``with use_backend(...)``, the environment variable ``VMAMBA_BACKEND`` (as it is
when this module is imported), automatic. An explicit choice never falls back: it raises with the reason and with what
would work.
``use_backend`` and the environment concern the operators that have such a backend; others choose by themselves.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.nn import Parameter

ORDER = ("cuda", "triton", "cpu", "reference")
ORDINARY = {Tensor, Parameter}
TRITON = find_spec("triton") is not None
INLINED = 1 << 20  # numbers of a map
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",)}

_environment = os.environ.get("VMAMBA_BACKEND", "")
_forced: list[str] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on one backend: ``cuda``, ``triton``, ``cpu`` or ``reference``.

    An operator that is not implemented for it at all chooses by itself.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    _forced.append(_known(name))
    try:
        yield
    finally:
        _forced.pop()


def choose(operator: str, requested: str, *tensors: Tensor | None) -> ModuleType:
    """The module that runs ``operator`` on ``tensors``; ``requested`` is the caller's choice or an empty string."""
    explicit = requested or _asked_for(operator)
    present = [t for t in tensors if t is not None]
    if not explicit:
        for name in available(operator):
            if why_not(operator, name, *present) is None:
                return _module(operator, name)
    reason = why_not(operator, _known(explicit), *present)
    if reason is None:
        return _module(operator, explicit)
    working = [name for name in available(operator) if why_not(operator, name, *present) is None]
    raise RuntimeError(f"{operator}: backend {explicit!r} cannot run here: {reason}; these can: {', '.join(working)}")


def _asked_for(operator: str) -> str:
    """What ``use_backend`` or the environment ask for, where ``operator`` has such a backend."""
    name = _forced[-1] if _forced else _environment
    return name if name and _known(name) in available(operator) else ""


def why_not(operator: str, name: str, *tensors: Tensor) -> str | None:
    """Why backend ``name`` cannot run ``operator`` on ``tensors``; None where it can."""
    if name not in available(operator):
        return f"{operator} has no {name!r} implementation (it has {', '.join(available(operator))})"
    device, devices = tensors[0].device.type, DEVICES.get(name)
    if devices and device not in devices and not _interpreted(name):
        return f"it needs tensors on {' or '.join(devices)}, these are on {device}"
    try:
        return _module(operator, name).why_not(*tensors)
    except ImportError as error:
        return f"{error.name or error} is not installed"


def _interpreted(name: str) -> bool:
    """Whether Triton's interpreter runs this backend, which takes every device."""
    return name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def eager(*tensors: Tensor) -> bool:
    """Whether nothing but autograd watches these tensors: no tracing, no transform, no subclass.

    An operator may then be run directly, without PyTorch's dispatcher, which takes longer than a small scan.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or peek_interpreter_stack() is not None:
        return False
    return not any([type(t) not in ORDINARY or not (t.is_cuda or t.is_cpu) for t in tensors])


def plain(*tensors: Tensor) -> bool:
    """Whether these tensors are :func:`eager` and no gradient is asked for."""
    return not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors])) and eager(*tensors)


def inlines(*tensors: Tensor) -> bool:
    """Whether a Triton kernel is to be traced by the compiler, and not an operator: small maps, without gradients.

    The compiler launches it like its own, which takes the host a fraction of what an operator does; for large maps the
    time of a kernel counts, and other kernels take less.
    """
    if not torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled() or not TRITON:
        return False
    known = all(t.dtype in (torch.float16, torch.bfloat16, torch.float32) for t in tensors)
    return known and not _forced and not _environment and tensors[0].is_cuda and tensors[0].numel() <= INLINED


def other_types(tensors: Iterable[Tensor], types: Sequence[torch.dtype]) -> str | None:
    """Why a backend that takes ``types`` cannot take these tensors; None where it can."""
    odd = [str(t.dtype) for t in tensors if t.dtype not in types]
    return f"it takes {', '.join(map(str, types))}, got {', '.join(sorted(set(odd)))}" if odd else None


@cache
def available(operator: str) -> tuple[str, ...]:
    """The backends that ``operator`` is implemented for, in order of preference."""
    return tuple(name for name in ORDER if find_spec(f"{__package__}.{operator}_{name}"))


def operators() -> list[str]:
    """Names of the operators that have backends."""
    files = Path(__file__).parent.glob("*_reference.py")
    names = (file.name.removesuffix("_reference.py") for file in files)
    return sorted(name for name in names if len(available(name)) > 1)


@cache
def _module(operator: str, name: str) -> ModuleType:
    return import_module(f"{__package__}.{operator}_{name}")


def _known(name: str) -> str:
    if name not in ORDER:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(ORDER)}")
    return name

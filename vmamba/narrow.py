"""Weights in the type that autocast computes in, all those of a mixer, an MLP or a stage in one launch.

Autocast casts each weight and bias apart when its layer is called, and each gradient apart on the way back. The values
are the same here; they are made anew in every call, so that none is ever stale.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.kernels.backends import eager
from vmamba.precision import autocasts

Layer = Callable[[Tensor], Tensor]
HALF = torch.bfloat16, torch.float16
# class of a layer -> the layer as a function of x, with other weights than its own
FUNCTIONAL: dict[type, Callable[..., Layer]] = {nn.Linear: lambda layer, **cast: partial(F.linear, **cast)}
NAMES = ["weight", "bias"]
Parts = tuple[Sequence[nn.Module], Sequence[Tensor]]
Cast = tuple[Sequence[Layer], Sequence[Tensor]]


class Narrowed(nn.Module):
    """A module some of whose layers and weights are cast together, by itself or with those of other modules."""

    def parts(self) -> Parts:
        """The layers, called as ``layer(x)``, and other weights that it uses in matrix products."""
        raise NotImplementedError

    def run(self, x: Tensor, layers: Sequence[Layer], weights: Sequence[Tensor]) -> Tensor:
        """What the module computes of x with ``layers`` and ``weights``, which are its :meth:`parts`, perhaps cast."""
        raise NotImplementedError

    @torch.compiler.assume_constant_result
    def castable(self) -> bool:
        """:func:`_castable` of its layers, which the compiler asks once."""
        return _castable(self.parts()[0])

    @torch.compiler.assume_constant_result
    def runs(self) -> bool:
        """Whether to call :meth:`run` is the same as to call the module."""
        return type(self).forward is Narrowed.forward and not watched(self)

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`run` with its own parts."""
        cast = narrow(x, [self])
        return self.run(x, *(cast[self] if cast else self.parts()))


def narrow(x: Tensor, modules: Sequence[Narrowed]) -> dict[Narrowed, Cast]:
    """The parts of ``modules`` such that autocast finds nothing left to cast, all cast in one launch on a GPU.

    A module is left out if a layer of it is of a class that ``FUNCTIONAL`` does not know, or must be called
    (:func:`watched`), or a weight is not float32; all are where autocast is off, and where something else than autograd
    watches the tensors.

    Args:
        x: what the first of them is called with; its device counts.
    """
    kind = x.device.type if isinstance(x, Tensor) else ""  # where symbols are traced there is nothing to ask
    if not autocasts(kind) or (dtype := torch.get_autocast_dtype(kind)) not in HALF:
        return {}
    found, wide = {}, []
    for module in modules:
        layers, weights = module.parts()
        if not (module.castable() if torch.compiler.is_dynamo_compiling() else _castable(layers)):
            continue
        both = [m._parameters[name] for m in layers for name in NAMES]
        tensors = [t for t in [*both, *weights] if t is not None]
        if all([t.dtype is torch.float32 for t in tensors]):
            found[module] = layers, weights
            wide += tensors
    if not wide or not eager_or_compiled(x, *wide):
        return {}
    cast = iter(cast_together(wide, dtype))
    return {module: _with(cast, *parts) for module, parts in found.items()}


def _castable(layers: Sequence[nn.Module]) -> bool:
    """Whether ``FUNCTIONAL`` knows every layer and none must be called (:func:`watched`)."""
    return all([type(m) in FUNCTIONAL and [*m._parameters] == NAMES for m in layers]) and not watched(*layers)


def _with(cast: Iterator[Tensor], layers: Sequence[nn.Module], weights: Sequence[Tensor]) -> Cast:
    run = []
    for layer in layers:
        weight, bias = next(cast), None if layer._parameters["bias"] is None else next(cast)
        run.append(FUNCTIONAL[type(layer)](layer, weight=weight, bias=bias))
    return run, [next(cast) for _ in weights]


def narrow_together(x: Tensor, modules: Sequence[nn.Module]) -> dict[nn.Module, Layer]:
    """How to call those of ``modules``, in this forward pass alone, whose weights were cast together, for maps like x.

    Where training is compiled each module casts its own, and each gradient is cast as soon as it is there.
    """
    if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
        return {}
    known = [m for m in modules if isinstance(m, Narrowed) and m.runs()]
    return {m: partial(m.run, layers=layers, weights=w) for m, (layers, w) in narrow(x, known).items()}


def eager_or_compiled(*tensors: Tensor) -> bool:
    """Whether nothing but autograd, or the compiler, watches these tensors."""
    return torch.compiler.is_dynamo_compiling() or eager(*tensors)


def watched(*modules: nn.Module) -> bool:
    """Whether one of these modules must be called: it has hooks or its own ``forward``, or was compiled by itself.

    Compiled code has asked when it was compiled: as with PyTorch's modules, hooks that come later are not seen.
    """
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
        if "forward" in m.__dict__ or m._compiled_call_impl is not None:
            return True
    return False


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Copies of ``tensors`` in ``dtype``, in one launch on a GPU; so are their gradients cast back.

    Where some are frozen they have a launch of their own.
    """
    if not torch.is_grad_enabled():
        return _cast(tensors, dtype)
    learned = [t for t in tensors if t.requires_grad]
    frozen = [t for t in tensors if not t.requires_grad]
    copies = iter(_Cast.apply(dtype, *learned) if learned else ()), iter(_cast(frozen, dtype) if frozen else ())
    return [next(copies[0] if t.requires_grad else copies[1]) for t in tensors]


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    if torch.compiler.is_dynamo_compiling():  # which loses what happens in place inside an autograd.Function
        return torch.ops.aten._foreach_copy.default(copies, tensors)
    torch._foreach_copy_(copies, list(tensors))
    return copies


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return tuple(_cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *cast_together(grads, ctx.dtype)

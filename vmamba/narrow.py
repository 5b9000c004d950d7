"""Weights in the type that autocast computes in, all those of a mixer or of an MLP in one launch.

Autocast casts each weight and bias apart when its layer is called, and each gradient apart on the way back. The values
are the same here; they are made anew in every call, so that none is ever stale.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.kernels.backends import eager
from vmamba.precision import autocasts

Layer = Callable[[Tensor], Tensor]
HALF = torch.bfloat16, torch.float16
PLAIN: dict[type, Callable[..., Layer]] = {nn.Linear: lambda layer, **cast: partial(F.linear, **cast)}
NAMES = ["weight", "bias"]


def narrow(
    x: Tensor, layers: Sequence[nn.Module], weights: Sequence[Tensor] = ()
) -> tuple[Sequence[Layer], Sequence[Tensor]]:
    """``layers``, and other ``weights``, such that autocast finds nothing left to cast.

    Returns the arguments themselves where autocast is off, where the class of a layer is not in ``PLAIN`` or it must be
    called (:func:`watched`), and where something else than autograd watches the tensors.

    Args:
        x: what the first layer is called with; its device counts.
        layers: called as ``layer(x)``.
        weights: used by the caller in matrix products.
    """
    kind = x.device.type if isinstance(x, Tensor) else ""  # where symbols are traced there is nothing to ask
    if not autocasts(kind) or (dtype := torch.get_autocast_dtype(kind)) not in HALF:
        return layers, weights
    wide = []
    for layer in layers:
        if type(layer) not in PLAIN or watched(layer) or [*layer._parameters] != NAMES:
            return layers, weights
        wide += [t for t in layer._parameters.values() if t is not None]
    wide += weights
    if any([t.dtype is not torch.float32 for t in wide]) or not free(x, *wide):
        return layers, weights
    cast = iter(cast_together(wide, dtype))
    own = [{name: t if t is None else next(cast) for name, t in layer._parameters.items()} for layer in layers]
    return [PLAIN[type(layer)](layer, **pair) for layer, pair in zip(layers, own, strict=True)], [*cast]


def free(*tensors: Tensor) -> bool:
    """Whether nothing but autograd, or the compiler, watches these tensors."""
    return torch.compiler.is_dynamo_compiling() or eager(*tensors)


def watched(*modules: nn.Module) -> bool:
    """Whether one of these modules must be called: it has hooks or its own ``forward``, or was compiled by itself."""
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

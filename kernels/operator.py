"""Operators of PyTorch, ``torch.ops.vmamba.<name>``, from functions with annotations.

What ``torch.library.custom_op`` does, without what it adds to each call (a search for outputs that share memory with
inputs, a switch between kernels, a guard against the compiler), which takes longer than a small kernel. Tests call
``torch.library.opcheck`` on every operator, which looks for the same mistakes once.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("vmamba", "FRAGMENT")
CHECKED = (torch.Tag.pt2_compliant_tag,)  # its fake implementation and gradients pass opcheck


class Operator:
    """``torch.ops.vmamba.<name>``, which computes a function of tensors and numbers on every device.

    Args:
        name: of the operator.
        function: its implementation, with annotations; it changes no argument and returns new tensors.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = f"vmamba::{name}"
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=CHECKED)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self._run = getattr(torch.ops.vmamba, name).default

    def __call__(self, *arguments: Any) -> Any:
        """Run through PyTorch's dispatcher."""
        return self._run(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A decorator: ``function`` makes the outputs' shapes, types and strides of tensors without data."""
        return torch.library.register_fake(self.name, function, lib=LIBRARY)

    def register_autograd(self, gradients: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """``gradients(ctx, *output gradients)``, after ``setup_context(ctx, inputs, output)``."""
        torch.library.register_autograd(self.name, gradients, setup_context=setup_context, lib=LIBRARY)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator: makes a function the operator ``torch.ops.vmamba.<name>``."""
    return lambda function: Operator(name, function)

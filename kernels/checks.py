"""One check of shapes for the operators, so that all of them complain in the same words."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SHOWN = 3  # of the shapes that would do


def check_shapes(wanted: Mapping[str, tuple[Any, ...]], letters: str, given: Tensor) -> None:
    """Compare tensors with the shapes that follow from one of them.

    Args:
        wanted: argument name -> the tensor, or None where it was left out, and the shapes that it may have.
        letters: name and axes of the tensor that decides, ``"u (b, d, l)"``. given: that tensor.

    Raises:
        ValueError: a tensor has another shape; the message says which would do.
    """
    for name, (tensor, *shapes) in wanted.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            allowed, got = " or ".join(map(str, shapes[:SHOWN])), tuple(tensor.shape)
            raise ValueError(f"{name} must be {allowed} for {letters} = {tuple(given.shape)}, got {got}")

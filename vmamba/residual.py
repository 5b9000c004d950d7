"""A block's branches and the residual stream (b, ..., c): adding, stochastic depth, and the norm that follows.

The stream of a column, whose blocks hand on the norm's input in two parts, is in ``vmamba.add_norm``.
"""

from typing import Any, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vmamba.kernels.backends import eager
from vmamba.kernels.residual_norm import computed
from vmamba.narrow import HALF, watched
from vmamba.norm import LayerNorm, opaque, result_type

PATHS = {nn.Identity, DropPath}


def add_branch_then_norm(
    x: Tensor, branch: Tensor, drop_path: nn.Module, norm: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """stream = x + drop_path(branch), and norm(stream): one pass over memory each way where a GPU computes both.

    Args:
        x, branch: (b, ..., c).
        drop_path: timm's ``DropPath``, or another module for the branch.
        norm: the norm that the next branch begins with; None for none, which gives the stream twice.
    """
    if isinstance(norm, LayerNorm) and isinstance(x, Tensor) and _fits(x, branch, drop_path, norm):
        factor, dtype = _factor(branch, drop_path), result_type(norm, x)
        arguments = x, branch, factor, norm.weight, norm.bias, norm.eps, dtype
        y, stream = computed(arguments, "", direct=not torch.compiler.is_dynamo_compiling())
        return stream, y
    stream = add_branch(x, branch, drop_path)
    return stream, stream if norm is None else norm(stream)


def _fits(x: Tensor, branch: Tensor, drop_path: nn.Module, norm: LayerNorm) -> bool:
    if not x.is_cuda or x.shape != branch.shape or not opaque(x, branch, cast(Tensor, norm.weight)):
        return False
    widens = x.dtype is not branch.dtype and not (x.dtype is torch.float32 and branch.dtype in HALF)
    return not widens and type(norm) is LayerNorm and type(drop_path) in PATHS and not watched(norm, drop_path)


def add_branch(x: Tensor, branch: Tensor, drop_path: nn.Module) -> Tensor:
    """x + drop_path(branch), (b, ..., c); in one pass over memory where a GPU trains, and one in the backward."""
    if not (isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob):
        return x + drop_path(branch)
    fits = eager(x, branch) and x.is_cuda and torch.promote_types(x.dtype, branch.dtype) == x.dtype
    factor = _factor(branch, drop_path) if fits and not watched(drop_path) else None
    if factor is None:
        return x + drop_path(branch)
    return _AddProduct.apply(x, branch, factor.view(-1, *(1,) * (branch.ndim - 1)))


def _factor(branch: Tensor, drop_path: nn.Module) -> Tensor | None:
    """What stochastic depth multiplies each sample of the branch with, (b,); None for 1."""
    if not (isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob):
        return None
    keep = 1 - drop_path.drop_prob
    factor = branch.new_empty((len(branch),) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
    if keep > 0 and drop_path.scale_by_keep:
        factor.div_(keep)
    return factor.flatten()


class _AddProduct(torch.autograd.Function):
    """x + branch * factor; ``out`` keeps autocast from widening the branch first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dtype = branch.dtype
        return torch.addcmul(x, branch, factor, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return dy, torch.mul(dy, factor, out=torch.empty_like(dy, dtype=ctx.dtype)), None

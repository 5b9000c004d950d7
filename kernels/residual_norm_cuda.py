"""A branch, a residual stream and its norm in CUDA C++ (``layer_norm.cu``): one pass over memory each way."""

import torch
from torch import Tensor

from vmamba.kernels import layer_norm_cuda

why_not = layer_norm_cuda.why_not  # tensors: x, weight, bias, perhaps branch


def forward(
    x: Tensor,
    branch: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y (..., c) in ``dtype``, and the stream (..., c); x itself where there is no branch."""
    weight, bias = weight.contiguous(), bias.to(weight.dtype).contiguous()
    if branch is not None:
        branch, factor = branch.contiguous(), None if factor is None else factor.to(branch.dtype).contiguous()
    return layer_norm_cuda.run_forward(x.contiguous(), branch, factor, weight, bias, eps, dtype)


def backward(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, factor: Tensor | None, weight: Tensor, eps: float,
    added: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the branch in its type ``added`` (x's where that is None), and of weight and bias, (2, c)."""
    dstream = None if dstream is None else dstream.to(stream.dtype).contiguous()
    factor = factor if factor is None else factor.to(added).contiguous()
    tensors = dy.contiguous(), dstream, stream.contiguous(), factor, weight.contiguous()
    return layer_norm_cuda.run_backward(*tensors, eps, added)

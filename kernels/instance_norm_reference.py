"""Instance normalisation, a residual and LeakyReLU by PyTorch; the equation is in ``instance_norm``."""

from torch import Tensor
from torch.nn import functional as F


def why_not(*tensors: Tensor) -> str | None:
    """None: PyTorch takes every device and floating-point type."""
    return None


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> Tensor:
    """x (b, c, *grid), residual like x, weight and bias (c,) -> (b, c, *grid); differentiable."""
    y = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    y = y if residual is None else y + residual
    return y if slope == 1 else F.leaky_relu(y, slope)

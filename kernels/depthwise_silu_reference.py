"""A depthwise convolution over a channels-last map, then SiLU; k x k taps, k odd, zeros around the map:

z[b, i, j, d] = bias[d] + sum over p, q of weight[d, 0, p, q] x[b, i + p - k // 2, j + q - k // 2, d]
y = z sigmoid(z)
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight


def why_not(*tensors: Tensor) -> str | None:
    """None: any tensor will do."""
    return None


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def _wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.permute(0, 3, 1, 2).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (b, h, w, d), weight (d, 1, k, k), bias (d,) -> (b, h, w, d) in x's dtype."""
    return F.silu(_convolved(*_wide(x, weight, bias))).permute(0, 2, 3, 1).to(x.dtype).contiguous()


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias, each in its tensor's dtype."""
    wide, taps, shift = _wide(x, weight, bias)
    z = _convolved(wide, taps, shift)
    s = z.sigmoid()
    dz = dy.permute(0, 3, 1, 2).to(z.dtype) * s * (1 + z * (1 - s))
    options = {"padding": weight.shape[-1] // 2, "groups": x.shape[3]}
    dx = conv2d_input(wide.shape, taps, dz, **options).permute(0, 2, 3, 1)
    dweight = conv2d_weight(wide, taps.shape, dz, **options)
    dbias = None if bias is None else dz.sum((0, 2, 3)).to(bias.dtype)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype).contiguous(), dbias

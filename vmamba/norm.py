"""LayerNorm over the channels of channels-last maps, in one pass over memory where a GPU runs it."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.kernels import layer_norm_cuda, nvrtc
from vmamba.kernels.backends import choose, eager
from vmamba.kernels.residual_norm import residual_norm

EPS = 1e-5


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last axis, whose result is in the type that the next layer computes in.

    Under autocast PyTorch's own returns float32, which the next matrix product then casts; here the cast is part of the
    norm. Where inference is compiled it is PyTorch's own, which the compiler fuses with its neighbours.

    Args:
        channels: size c of the last axis.
        eps: added to the variance.
        wide: the result stays float32 under autocast, as the residual stream and a network's results should.
        device, dtype: of the parameters.
    """

    def __init__(self, channels: int, *, eps: float = EPS, wide: bool = False, device=None, dtype=None):
        super().__init__(channels, eps, device=device, dtype=dtype)
        self.wide = wide

    def forward(self, input: Tensor) -> Tensor:
        """(..., c) -> (..., c)"""
        weight, bias = self.weight, self.bias
        if input.is_cuda and eager(input, weight, bias):
            dtype, backend = result_type(self, input), choose("layer_norm", "", input, weight, bias)
            if input.numel() >= backend.LEAST:
                return backend.forward(input, weight, bias, self.eps, dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps).to(dtype)
        if input.is_cuda and opaque(input, weight, bias):
            dtype = result_type(self, input)
            return residual_norm(input, None, None, weight, bias, eps=self.eps, dtype=dtype)[0]
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def result_type(norm: LayerNorm, input: Tensor) -> torch.dtype:
    """That of the next layer under autocast, which is on for a GPU; else that of ``input``."""
    if not torch.is_autocast_enabled("cuda"):
        return input.dtype
    return torch.float32 if norm.wide else torch.get_autocast_dtype("cuda")


def opaque(*tensors: Tensor) -> bool:
    """Whether norms of these tensors on a GPU are to be operators of ours: eagerly, and where training is compiled.

    The compiler fuses a norm with its neighbours, which is best for inference; its backward takes longer than ours.
    """
    if not torch.compiler.is_dynamo_compiling():
        return eager(*tensors)
    known = all(t.dtype in layer_norm_cuda.TYPES for t in tensors) and tensors[0].shape[-1] <= layer_norm_cuda.WIDEST
    return known and torch.is_grad_enabled() and _compiles()


@torch.compiler.assume_constant_result
def _compiles() -> bool:
    return nvrtc.why_not() is None

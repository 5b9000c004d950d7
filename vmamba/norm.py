"""LayerNorm over the channels of channels-last maps, in one pass over memory where a GPU runs it."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.kernels.backends import choose, eager

EPS = 1e-5


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last axis, whose result is in the type that the next layer computes in.

    Under autocast PyTorch's own returns float32, which the next matrix product then casts; here the cast is part of the
    norm. Inside ``torch.compile`` it is PyTorch's own, which the compiler fuses with its neighbours.

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
        if not (input.is_cuda and eager(input, self.weight, self.bias)):
            return super().forward(input)
        dtype = input.dtype
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.float32 if self.wide else torch.get_autocast_dtype("cuda")
        backend = choose("layer_norm", "", input, self.weight, self.bias)
        if input.numel() < backend.LEAST:
            return super().forward(input).to(dtype)
        return backend.forward(input, self.weight, self.bias, self.eps, dtype)

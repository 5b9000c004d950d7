"""Softmax attention between all pixels of a map (Transformer, arXiv:1706.03762), by timm."""

from timm.layers import Attention
from torch import Tensor


class SelfAttention(Attention):
    """(b, h, w, c) -> (b, h, w, c): multi-head attention without positions, as one fused operator.

    Args:
        dim: channels c.
        heads: number of heads, which divides c.
        device, dtype: of the parameters.

    Raises:
        ValueError: the channels do not divide into the heads.
    """

    def __init__(self, dim: int, *, heads: int, device=None, dtype=None):
        if dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} heads")
        super().__init__(dim, heads, qkv_bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

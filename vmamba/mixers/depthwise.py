"""Short depthwise filters before a scan: around each pixel of the map, or causal in reading order."""

from typing import cast

from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.block import Conv2d
from vmamba.kernels.causal_conv1d import causal_conv1d


class DepthwiseConv(Conv2d):
    """A filter around each pixel, (b, h, w, c) -> (b, h, w, c), as VMamba's blocks have it.

    Args:
        channels: c. size: odd width of the filter. bias: whether there is one.
        device, dtype: of the parameters.

    Raises:
        ValueError: the size is even.
    """

    def __init__(self, channels: int, size: int = 3, *, bias: bool = True, device=None, dtype=None):
        if size % 2 == 0:
            raise ValueError(f"a filter around a pixel must have an odd size, got {size}; CausalConv takes any")
        super().__init__(
            channels, channels, size, padding=size // 2, groups=channels, bias=bias, device=device, dtype=dtype
        )


@register_notrace_module
class CausalConv(nn.Conv1d):
    """A filter over the pixel and those before it, row by row, (b, h, w, c) -> (b, h, w, c).

    On a (1, l) grid it is the causal convolution of the blocks for sequences (``vmamba.kernels.causal_conv1d``).

    Args:
        channels: c. size: width of the filter. bias: whether there is one.
        device, dtype: of the parameters.
    """

    def __init__(self, channels: int, size: int = 4, *, bias: bool = True, device=None, dtype=None):
        super().__init__(channels, channels, size, groups=channels, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        pixels = input.flatten(1, 2).mT  # (b, c, l)
        y = causal_conv1d(pixels, self.weight[:, 0], self.bias)
        return cast(Tensor, y).mT.unflatten(1, input.shape[1:3])

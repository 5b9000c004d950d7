"""A depthwise convolution and SiLU in CUDA C++ (``depthwise_silu.cu``), forward and backward.

The equation is in ``depthwise_silu_reference``. There are no atomics: sums over pixels are taken per block and then
over blocks, in a fixed order.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vmamba.kernels import nvrtc
from vmamba.kernels.backends import other_types

SOURCE = Path(__file__).with_name("depthwise_silu.cu")
TYPES = {torch.bfloat16: "T_BF16", torch.float16: "T_FP16", torch.float32: "T_FP32"}
TAPS = 3, 5  # a side; more leave too few registers
THREADS, SLAB, STRIP = 256, 32, 4  # of a block, channels of a block, pixels of a thread
STRIPS = 64  # of a block in the forward
BLOCKS = 1056  # at most in the backward, each with its own sums: eight for each multiprocessor of an H200


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (x, weight, perhaps bias) can be convolved; the device is ``backends``' business."""
    wrong = other_types(tensors[:1], tuple(TYPES)) or nvrtc.why_not()
    return wrong or (wrong_size(*tensors) if len(tensors) > 1 else None)


def wrong_size(x: Tensor, weight: Tensor, *rest: Tensor) -> str | None:
    """None where the kernels are made for maps and taps of these sizes."""
    if x.shape[-1] % 8:
        return f"it takes channels in multiples of 8, got {x.shape[-1]}"
    if x.numel() >= 2**31:
        return f"it takes maps of less than 2^31 numbers, got {tuple(x.shape)}"
    if weight.shape[-1] not in TAPS:
        return f"it takes {', '.join(map(str, TAPS))} taps a side, got {weight.shape[-1]}"
    return None


@cache
def _kernel(name: str, dtype: torch.dtype, taps: int, bias: bool, device: int) -> nvrtc.Kernel:
    return nvrtc.kernel(SOURCE, name, defines(dtype, taps, bias), device)


def defines(dtype: torch.dtype, taps: int, bias: bool) -> tuple[str, ...]:
    """The compile-time settings of the source."""
    return TYPES[dtype], f"K={taps}", f"BIAS={int(bias)}"


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (b, h, w, d), weight (d, 1, k, k), bias (d,) -> (b, h, w, d) in x's dtype."""
    x, taps = _readable(x), weight.float().contiguous()
    shift = taps if bias is None else bias.float().contiguous()  # a pointer that is not read
    (b, h, w, d), y = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strips = b * h * -(-w // STRIP)
    if y.numel():
        run = _kernel("forward", x.dtype, weight.shape[-1], bias is not None, x.device.index)
        run((-(-strips // STRIPS) * -(-d // SLAB), 1), THREADS, x, taps, shift, y, strips, h, w, d, x.stride(2))
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias, each in its tensor's dtype."""
    x, taps = _readable(x), weight.float().contiguous()
    shift, dy = taps if bias is None else bias.float().contiguous(), _readable(dy.to(x.dtype).contiguous())
    (b, h, w, d), k = x.shape, weight.shape[-1]
    setting = x.dtype, k, bias is not None, x.device.index
    dx, dz = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    strips, slabs = b * h * -(-w // STRIP), -(-d // SLAB)
    blocks = min(max(1, BLOCKS // slabs), -(-strips // STRIPS))
    sums = x.new_empty(blocks, d * (k * k + 1), dtype=torch.float32)
    if dx.numel():
        run = _kernel("backward", *setting)
        run((blocks * slabs, 1), THREADS, dy, x, taps, shift, dz, sums, strips, h, w, d, x.stride(2))
        run = _kernel("transposed", *setting)
        run((-(-strips // STRIPS) * slabs, 1), THREADS, dz, taps, dx, strips, h, w, d)
    dweight, dbias = sums.sum(0).split([d * k * k, d])
    dbias = None if bias is None else dbias.to(bias.dtype, copy=True)  # in memory of its own
    return dx, dweight.view(weight.shape).to(weight.dtype), dbias


def _readable(x: Tensor) -> Tensor:
    """x itself where its pixels lie evenly in memory and their channels can be read 8 at a time, else a copy."""
    _, h, w, _ = x.shape
    image, row, pixel, channel = x.stride()
    even = channel == 1 and row == w * pixel and image == h * row and pixel % 8 == 0
    return x if even and x.data_ptr() % 32 == 0 else x.clone(memory_format=torch.contiguous_format)

"""A residual stream and its norm in CUDA C++ (``add_norm.cu``): one pass over memory, rows of up to 2048 channels.

For inference; where gradients are asked for, ``add_norm`` goes step by step.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vmamba.kernels import nvrtc, stored
from vmamba.kernels.add_norm_reference import Norm

SOURCE = Path(__file__).with_name("add_norm.cu")
WIDEST = 2048
ROWS = 4  # of a block, a warp each


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (h and what there is of r, weight and bias) can be normalised on a GPU."""
    channels = tensors[0].shape[-1]
    wider = f"it takes up to {WIDEST} channels, got {channels}" if channels > WIDEST else None
    return stored.mixed(*(t.dtype for t in tensors)) or nvrtc.why_not() or wider


@cache
def defines(channels: int, aligned: bool, h: torch.dtype, x: torch.dtype, flags: tuple[bool, ...]) -> tuple[str, ...]:
    """What the source is compiled with: as few lanes without work as can be, then as few reads.

    Args:
        aligned: whether every tensor begins at a multiple of 16 bytes.
        h, x: types of h and x. flags: whether ADD, KEEP, CENTRED, BIASED.
    """
    choices = [(v, -(-channels // (32 * v))) for v in ((4, 2, 1) if aligned else (1,)) if channels % v == 0]
    vector, per = min(choices, key=lambda choice: (choice[0] * choice[1], choice[1]))
    named = zip(("ADD", "KEEP", "CENTRED", "BIASED"), flags, strict=True)
    return *stored.defines(H=h, X=x), f"VECTOR={vector}", f"PER={per}", *(f"{name}={int(on)}" for name, on in named)


def forward(h: Tensor, r: Tensor | None, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h, r (..., c) -> x (..., c) in ``dtype`` and the stream (..., c) in float32; h itself where it is the stream."""
    if stored.mixed(h.dtype, dtype):
        x, stream = forward(h, r, norm, torch.float32)
        return x.to(dtype), stream
    h, channels = h.contiguous(), h.shape[-1]
    flags = r is not None, r is not None or h.dtype != torch.float32, norm.centred, norm.bias is not None
    x, rows = torch.empty_like(h, dtype=dtype), h.numel() // max(channels, 1)
    stream = torch.empty_like(h, dtype=torch.float32) if flags[1] else h
    if rows and channels:
        other = h if r is None else r.float().contiguous()
        weight, bias = (t.float().contiguous() for t in (norm.weight, norm.weight if norm.bias is None else norm.bias))
        aligned = not any(t.data_ptr() % 16 for t in (h, other, weight, bias))
        run = nvrtc.kernel(SOURCE, "forward", defines(channels, aligned, h.dtype, dtype, flags), h.device.index)
        blocks = -(-rows // ROWS), 1
        run(blocks, 32 * ROWS, h, other, weight, bias, x, stream, rows, channels, float(norm.eps))
    return x, stream

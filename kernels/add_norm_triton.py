"""A residual stream and its norm in Triton, in one pass over memory, for rows of up to 8192 channels.

A program holds whole rows. For inference; where gradients are asked for, ``add_norm`` goes step by step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels.add_norm_reference import Norm
from vmamba.kernels.backends import other_types

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 8192
TILE = 2048  # about so many numbers per program


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors can be normalised; the device is the business of ``backends``."""
    channels = tensors[0].shape[-1]
    wider = f"it takes up to {WIDEST} channels, got {channels}" if channels > WIDEST else None
    return other_types(tensors, DTYPES) or wider


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    h, r, weight, bias, x, stream, rows, channels, eps,
    ADD: tl.constexpr, KEEP: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    in_c = c < channels
    inside = (i < rows)[:, None] & in_c[None, :]
    at = i[:, None] * channels + c[None, :]
    row = tl.load(h + at, inside, 0).to(tl.float32)
    if ADD:
        row += tl.load(r + at, inside, 0).to(tl.float32)
    if KEEP:
        tl.store(stream + at, row, inside)
    if CENTRED:
        row = tl.where(in_c[None, :], row - (tl.sum(row, 1) / channels)[:, None], 0)
    row *= tl.rsqrt(tl.sum(row * row, 1) / channels + eps)[:, None]
    row *= tl.load(weight + c, in_c, 0).to(tl.float32)[None, :]
    if BIASED:
        row += tl.load(bias + c, in_c, 0).to(tl.float32)[None, :]
    tl.store(x + at, row, inside)


def forward(h: Tensor, r: Tensor | None, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h, r (..., c) -> x (..., c) in ``dtype`` and the stream (..., c) in float32; h itself where it is the stream."""
    h, channels = h.contiguous(), h.shape[-1]
    add = r is not None
    keep = add or h.dtype != torch.float32
    r = r.contiguous() if add else h
    x = torch.empty_like(h, dtype=dtype)
    stream = torch.empty_like(h, dtype=torch.float32) if keep else h
    width = triton.next_power_of_2(channels)
    height = max(1, TILE // width)
    flags = add, keep, norm.centred, norm.bias is not None
    sizes = h.numel() // max(channels, 1), channels, norm.eps
    if h.numel():
        with torch.cuda.device_of(h):
            _kernel[(triton.cdiv(sizes[0], height),)](
                h, r, norm.weight, norm.weight if norm.bias is None else norm.bias, x, stream, *sizes,
                *flags, height, width, num_warps=4 if width <= TILE else 8,
            )  # fmt: skip
    return x, stream

"""Layer normalisation in CUDA C++ (``layer_norm.cu``), forward and backward, for rows of up to 8192 channels.

The equation is in ``layer_norm_reference``. Rows stay in registers, so that one pass over memory does; x is read and
y written in whatever types the neighbours have. Sums over rows (gradients of weight and bias) are taken per block and
then over blocks, in a fixed order.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vmamba.kernels import nvrtc
from vmamba.kernels.backends import other_types

SOURCE = Path(__file__).with_name("layer_norm.cu")
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
LEAST = 0  # numbers; smaller maps are left to PyTorch
MOST = 1 << 22  # numbers; larger maps take Triton less time (measured on an H200)
WIDEST = 8192
THREADS = 256
BLOCKS = 528  # at most in the backward, each with its own sums over rows: four for each multiprocessor of an H200


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (x, weight, bias) can be normalised; the device is the business of ``backends``."""
    channels = tensors[0].shape[-1]
    wider = f"it takes up to {WIDEST} channels, got {channels}" if channels > WIDEST else None
    larger = f"it takes up to {MOST} numbers, got {tensors[0].numel()}" if tensors[0].numel() > MOST else None
    return other_types(tensors, tuple(TYPES)) or wider or larger or nvrtc.why_not()


class Plan(NamedTuple):
    """How rows are dealt out: ``lanes`` hold ``rows`` rows at a time, each ``per`` packs of ``pack`` channels."""

    lanes: int
    rows: int
    per: int
    pack: int


@cache
def plan(channels: int, aligned: bool) -> Plan:
    """For rows of so many channels; ``aligned``: four of them can be read at once."""
    pack = 4 if aligned and channels % 4 == 0 else 1
    lanes = next(n for n in (8, 16, 32, 64, 128, 256) if channels <= 16 * n or n == 256)
    per = -(-channels // (lanes * pack))
    return Plan(lanes, 2 if lanes <= 32 else 1, per, pack)


def defines(x: torch.dtype, y: torch.dtype, weight: torch.dtype, rows: Plan) -> tuple[str, ...]:
    """The compile-time settings of the source."""
    types = f"IN={TYPES[x]}", f"OUT={TYPES[y]}", f"WEIGHT={TYPES[weight]}", "T_FP32"
    return *types, f"LANES={rows.lanes}", f"ROWS={rows.rows}", f"PER={rows.per}", f"PACK={rows.pack}"


@cache
def _kernel(
    name: str, x: torch.dtype, y: torch.dtype, weight: torch.dtype, channels: int, aligned: bool, device: int
) -> tuple[nvrtc.Kernel, int]:
    """The kernel, and rows that a block of it holds at once."""
    rows = plan(channels, aligned)
    teams = THREADS // rows.lanes
    held = teams * rows.rows if name == "forward" else teams
    return nvrtc.kernel(SOURCE, name, defines(x, y, weight, rows), device), held


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(x, dtype=dtype)
    channels = x.shape[-1]
    rows = x.numel() // channels
    if rows:
        aligned = not (x.data_ptr() % 16 or weight.data_ptr() % 16 or bias.data_ptr() % 16)
        run, held = _kernel("forward", x.dtype, dtype, weight.dtype, channels, aligned, x.device.index)
        run((-(-rows // held), 1), THREADS, x, weight, bias, y, rows, channels, float(eps))
    return y


def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of weight and bias, (2, c)."""
    dx, channels = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // channels
    aligned = not (x.data_ptr() % 16 or dy.data_ptr() % 16 or weight.data_ptr() % 16)
    run, held = _kernel("backward", x.dtype, dy.dtype, weight.dtype, channels, aligned, x.device.index)
    blocks = min(BLOCKS, -(-rows // held))
    sums = x.new_empty(2, blocks, channels, dtype=torch.float32)
    if rows:
        run((blocks, 1), THREADS, dy, x, weight, dx, *sums, rows, channels, float(eps))
    return dx, sums.sum(1)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, bias, eps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, sums = _backward(dy.contiguous(), x, weight, ctx.eps)
        dweight, dbias = sums.to(weight.dtype)
        return dx, dweight, dbias, None, None


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., c) -> (..., c) in ``dtype``, computed in float32; differentiable once."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.to(weight.dtype).contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _LayerNorm.apply(x, weight, bias, eps, dtype)
    return _forward(x, weight, bias, eps, dtype)

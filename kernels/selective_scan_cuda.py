"""Selective scan in CUDA C++ (``selective_scan.cu``): the forward for several states; the backward is Triton's.

The equation and its letters are in ``selective_scan_reference``. A lane scans a channel with all its states in
registers, which pays from about eight states on; long sequences are cut into segments where there are few of them.
"""

from pathlib import Path

import torch
from torch import Tensor

from vmamba.kernels import nvrtc
from vmamba.kernels.backends import other_types
from vmamba.kernels.selective_scan_reference import CHUNK
from vmamba.kernels.selective_scan_triton import backward

__all__ = ["backward", "forward", "why_not"]
SOURCE = Path(__file__).with_name("selective_scan.cu")
TYPES = {torch.bfloat16: "T_BF16", torch.float16: "T_FP16", torch.float32: "T_FP32"}
STATES = range(4, 33)  # fewer leave a lane too little to do, more do not fit in its registers
THREADS = 128
WARPS = 4096  # about as many fill a large GPU


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (u, delta, A, B, C and what there is of D, z, bias) can be scanned on a GPU."""
    wrong = other_types(tensors, tuple(TYPES)) or nvrtc.why_not()
    return wrong or (_wrong_size(*tensors) if len(tensors) > 1 else None)


def _wrong_size(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Tensor) -> str | None:
    if A.shape[-1] not in STATES:
        return f"it takes {STATES[0]} to {STATES[-1]} states, got {A.shape[-1]}"
    if len({t.dtype for t in (u, delta, B, C)}) > 1:
        return f"it takes u, delta, B and C of one type, got {u.dtype}, {delta.dtype}, {B.dtype}, {C.dtype}"
    if max(t.numel() for t in (B, C)) >= 2**31:
        return "it takes B and C of less than 2^31 numbers"
    return None


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, k, l, d), last state (b, k, d, n) and states before each chunk (b, k, chunks, d, n), in float32.

    Args: u, delta, z (b, k, l, d), A (k, d, n), B, C (b, k, l, n), D, bias (k, d); any strides.
    """
    (b, k, length, d), n = u.shape, A.shape[-1]
    y, last, states = (
        u.new_empty(b, k, *shape, dtype=torch.float32) for shape in ((length, d), (d, n), (-(-length // CHUNK), d, n))
    )
    if not y.numel():
        return y, last.zero_(), states
    segments, per = _segments(b * k * -(-d // 32), length)
    ends = u.new_empty(segments - 1, b, k, d, n + 1, dtype=torch.float32)
    end_states, end_steps = ends.flatten().split([ends[..., :n].numel(), ends[..., n].numel()])
    none = y  # a pointer that is not read
    u, delta, gate = (none if t is None else t.to(u.dtype).contiguous() for t in (u, delta, z))
    rates, skip, shift = (none if t is None else t.float().contiguous() for t in (A, D, bias))
    tensors = u, delta, rates, B, C, skip, gate, shift
    blocks = b * k * -(-d // THREADS)
    arguments = *tensors, y, last, states, end_states, end_steps, k, length, d, per, *B.stride(), *C.stride()
    there = {"HAS_D": D, "HAS_Z": z, "HAS_BIAS": bias}
    flags = *(f"{name}={int(t is not None)}" for name, t in there.items()), f"SOFTPLUS={int(softplus)}"
    defines = TYPES[u.dtype], f"N={n}", *flags
    with torch.cuda.device(u.device):
        if segments > 1:
            nvrtc.kernel(SOURCE, "ends", defines, u.device.index)((blocks, segments - 1), THREADS, *arguments)
        nvrtc.kernel(SOURCE, "forward", defines, u.device.index)((blocks, segments), THREADS, *arguments)
    return y, last, states


def _segments(warps: int, length: int) -> tuple[int, int]:
    """Into how many segments a sequence is cut, and steps of each: whole chunks."""
    wanted = min(max(1, WARPS // warps), max(1, length // (2 * CHUNK)))
    per = -(-length // (wanted * CHUNK)) * CHUNK
    return -(-length // per), per

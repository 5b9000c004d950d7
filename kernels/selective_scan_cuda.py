"""Selective scan in CUDA C++ (``selective_scan.cu``), forward and backward, for several states.

The equation and its letters are in ``selective_scan_reference``. Several lanes share a channel, as many as it takes to
fill the GPU; where even that is not enough, the forward cuts long sequences into segments. Nothing is atomic: sums over
blocks of channels and over b are taken from slices, in a fixed order.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmamba.kernels import nvrtc
from vmamba.kernels.backends import other_types
from vmamba.kernels.selective_scan_reference import CHUNK

SOURCE = Path(__file__).with_name("selective_scan.cu")
TYPES = {torch.bfloat16: "T_BF16", torch.float16: "T_FP16", torch.float32: "T_FP32"}
STATES = range(4, 65)  # with fewer there is too little to share
SHARES = (4, 2, 1)  # states that a lane may have, the cheapest first
MOST_LANES = 16
FORWARD_WARPS, BACKWARD_WARPS = 1500, 700  # about as many fill a large GPU (measured on an H200)
FEWEST_SEGMENTS = 4  # at least as many, or none
SUB = 8  # the source's
FLAGS = "HAS_D", "HAS_Z", "HAS_BIAS", "SOFTPLUS"


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
    states = u.new_empty(b, k, -(-length // CHUNK), d, n, dtype=torch.float32)
    return *_run(states, torch.float32, softplus, u, delta, A, B, C, D, z, bias), states


def values(softplus: bool, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
    """y alone, in u's type or float32; the tensors as in :func:`forward`. No states are kept for a backward."""
    return _run(None, dtype, softplus, *tensors)[0]


def _run(states: Tensor | None, dtype: torch.dtype, softplus: bool, *tensors: Any) -> tuple[Tensor, Tensor]:
    (b, k, length, d), n = tensors[0].shape, tensors[2].shape[-1]
    new = tensors[0].new_empty
    y, last = new(b, k, length, d, dtype=dtype), new(b, k, d, n, dtype=torch.float32)
    if not y.numel():
        return y, last.zero_()
    call = Call(tensors, softplus, FORWARD_WARPS, segmented=True)
    per = -(-length // (call.plan.segments * CHUNK)) * CHUNK  # steps of a segment: whole chunks
    segments = -(-length // per)
    before = (segments - 1) * b * k * d
    ends = new(before * (n + 1), dtype=torch.float32)
    end_states, end_steps = (ends[: before * n], ends[before * n :]) if before else (y, y)
    arguments = *call.tensors, y, last, y if states is None else states, end_states, end_steps
    sizes = k, length, d, per, *call.strides
    extra = f"KEEP={int(states is not None)}", *(() if dtype == torch.float32 else ("NARROW",))
    if segments > 1:
        call.launch("ends", extra, segments - 1, *arguments, *sizes)
    call.launch("forward", extra, segments, *arguments, *sizes)
    return y, last


def backward(
    dy: Tensor,
    states: Tensor,
    softplus: bool,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, bias, in their shapes and dtypes; None where the input is None."""
    tensors = u, delta, A, B, C, D, z, bias
    (b, k, length, d), n = u.shape, A.shape[-1]
    call = Call(tensors, softplus, BACKWARD_WARPS)
    new = states.new_empty if u.numel() else states.new_zeros  # of nothing the sums are zeros
    du, ddelta, dz = (call.none if t is None else new(u.shape, dtype=u.dtype) for t in (u, delta, z))
    dA, dmaps, dD, dbias = new(b, k, d, n), new(call.blocks // (b * k), b, k, length, 2, n), new(b, k, d), new(b, k, d)
    if du.numel():
        dy = dy.to(states.dtype).contiguous()
        arguments = dy, states, *call.tensors, du, ddelta, dz, dA, dmaps, dD, dbias, k, length, d, *call.strides
        shared = call.shared_bytes()
        call.launch("backward", ("KEEP=1", f"BACKWARD_BYTES={shared}"), 1, *arguments, shared=shared)
    dB, dC = (part.sum(0) for part in dmaps.unbind(-2))  # apart, since no two results may share memory
    grads = du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0)
    return tuple(None if t is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True))


class Plan(NamedTuple):
    """How the work is shared out: states of a lane, lanes of a channel, segments of a sequence, threads of a block."""

    share: int
    lanes: int
    segments: int
    threads: int
    defines: tuple[str, ...]


@cache
def _plan(
    dtype: torch.dtype, sequences: int, d: int, n: int, warps: int, length: int, wide: int, flags: tuple[bool, ...]
) -> Plan:
    share, lanes, segments = _shares(sequences * d, n, warps, length)
    threads = max(128, 16 * lanes)
    sizes = f"N={n}", f"S={share}", f"WIDE={wide}", f"THREADS={threads}"
    given = (f"{name}={int(flag)}" for name, flag in zip(FLAGS, flags, strict=True))
    return Plan(share, lanes, segments, threads, (TYPES[dtype], *sizes, *given))


@cache
def _kernel(name: str, plan: Plan, defines: tuple[str, ...], device: int, shared: int) -> nvrtc.Kernel:
    return nvrtc.kernel(SOURCE, name, (*plan.defines, *defines), device, shared)


class Call:
    """What launches have in common: tensors as the kernels read them, and the plan.

    Args:
        tensors: u, delta, A, B, C, D, z, bias. softplus: whether delta goes through it.
        warps: about as many are wanted. segmented: whether sequences may be cut.
    """

    def __init__(self, tensors: tuple[Any, ...], softplus: bool, warps: int, segmented: bool = False):
        u, delta, A, B, C, D, z, bias = tensors
        self.none = u  # a pointer that is not read
        flags = D is not None, z is not None, bias is not None, softplus
        u, delta, z = (self.none if t is None else t.to(u.dtype).contiguous() for t in (u, delta, z))
        rates, skip, shift = (self.none if t is None else t.float().contiguous() for t in (A, D, bias))
        self.tensors, self.strides = (u, delta, rates, B, C, skip, z, shift), (*B.stride(), *C.stride())
        (b, k, length, d), n, pair = u.shape, A.shape[-1], 2 * u.itemsize
        wide = 1 if d % 2 or any(t.data_ptr() % pair for t in (u, delta, z)) else 2
        self.plan = _plan(u.dtype, b * k, d, n, warps, length if segmented else 0, wide, flags)
        self.blocks = b * k * -(-d // (self.plan.threads // self.plan.lanes))
        self.has_z = flags[1]

    def launch(self, name: str, defines: tuple[str, ...], segments: int, *arguments: Tensor | int, shared: int = 0):
        """Run a kernel of the source on the tensors' device."""
        run = _kernel(name, self.plan, defines, self.tensors[0].device.index, shared)
        run((self.blocks, segments), self.plan.threads, *arguments)

    def shared_bytes(self) -> int:
        """Of a block's shared memory in the backward: the source's structure of that name."""
        share, lanes, _, threads, _ = self.plan
        states, channels = lanes * share, threads // lanes
        maps, before = CHUNK * 2 * states, CHUNK // SUB * share * threads
        d_maps = 2 * (threads // 32) * SUB * 2 * states
        return 4 * ((4 if self.has_z else 3) * CHUNK * channels + maps + before + d_maps)


def _shares(channels: int, states: int, warps: int, length: int) -> tuple[int, int, int]:
    """States of a lane, lanes of a channel, segments of a sequence: few lanes, but about as many ``warps`` in all.

    Where half as many lanes as there could be do not give that, segments do it better than more lanes, if the sequence
    is long enough for them: they cost a second pass.
    """
    lanes_of = {share: 1 << max(0, -(-states // share) - 1).bit_length() for share in SHARES}
    possible = [(share, lanes) for share, lanes in lanes_of.items() if lanes <= MOST_LANES]
    for share, lanes in possible[:2]:
        if channels * lanes >= warps * 32:
            return share, lanes, 1
    segments = min(2 * warps * 32 // (channels * possible[0][1]), length // (2 * CHUNK))
    return (*possible[0], segments) if segments >= FEWEST_SEGMENTS else (*possible[-1], 1)

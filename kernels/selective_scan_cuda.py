"""Selective scan in CUDA C++ (``selective_scan*.cu``) for several states.

The equation and its letters are in ``selective_scan_reference``, how the work is shared out in ``selective_scan_plan``.
Nothing is atomic: sums over blocks of channels and over b are taken from slices, in a fixed order.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vmamba.kernels import nvrtc
from vmamba.kernels import selective_scan_plan as plans
from vmamba.kernels.backends import other_types
from vmamba.kernels.gpu import gpu_of
from vmamba.kernels.selective_scan_reference import CHUNK

SOURCE = Path(__file__).with_name("selective_scan.cu")
BACKWARD = {
    plans.StateLanes: SOURCE.with_name("selective_scan_backward.cu"),
    plans.StepLanes: SOURCE.with_name("selective_scan_backward_steps.cu"),
}
FOLD = SOURCE.with_name("selective_scan_fold.cu")
TYPES = {torch.bfloat16: "T_BF16", torch.float16: "T_FP16", torch.float32: "T_FP32"}
STATES = range(4, 65)  # with fewer there is too little to share
FLAGS = "HAS_D", "HAS_Z", "HAS_BIAS", "SOFTPLUS"
Plan: TypeAlias = plans.StateLanes | plans.StepLanes


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
    inputs, plan = Inputs(tensors, softplus), _forward_plan(b * k, d, n, tensors[0].device, length)
    per = -(-length // (plan.segments * plans.TILE)) * plans.TILE  # steps of a segment: whole tiles
    segments = -(-length // per)
    before = (segments - 1) * b * k * d
    ends = new(before * (n + 1), dtype=torch.float32)
    end_states, end_steps = (ends[: before * n], ends[before * n :]) if before else (y, y)
    arguments = *inputs.tensors, y, last, y if states is None else states, end_states, end_steps
    done = int(segments > 1)  # segments that ``ends`` does
    sizes = k, length, d, per, done, *inputs.strides
    flags = f"KEEP={int(states is not None)}", *(() if dtype == torch.float32 else ("NARROW",))
    defines = *inputs.defines(plan), *flags
    blocks = b * k * -(-d // plan.channels)
    if segments > 1:
        nvrtc.kernel(SOURCE, "ends", defines, inputs.device)((blocks, segments - 1), plan.threads, *arguments, *sizes)
    run = nvrtc.kernel(SOURCE, "forward", defines, inputs.device)
    run((blocks, segments - done), plan.threads, *arguments, *sizes)
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
    inputs, plan = Inputs(tensors, softplus), _backward_plan(b * k, d, n, u.device, length)
    blocks, rows = -(-d // plan.channels), b * k * length
    per = max(1, -(-length // (plan.segments * CHUNK))) * CHUNK
    segments = max(1, -(-length // per))
    new = states.new_empty if u.numel() else states.new_zeros  # of nothing the sums are zeros
    du, ddelta, dz = (inputs.none if t is None else new(t.shape, dtype=u.dtype) for t in (u, delta, z))
    dB, dC = (new(t.shape, dtype=u.dtype) for t in (B, C))
    dA, dD, dbias = (new(segments * b, *shape) for shape in ((k, d, n), (k, d), (k, d)))
    dmaps = new(blocks, rows, 2, n)
    if du.numel():
        dy = dy.to(states.dtype).contiguous()
        dy = dy.clone() if dy.data_ptr() % 8 else dy  # two are read at once
        shared, defines = _backward_defines(plan, n, z is not None, length)
        defines = *inputs.defines(plan), *defines
        run = nvrtc.kernel(BACKWARD[type(plan)], "backward", defines, inputs.device, shared)
        fold = nvrtc.kernel(FOLD, "fold", (TYPES[u.dtype], f"N={n}"), inputs.device)
        arguments = dy, states, *inputs.tensors, du, ddelta, dz, dA, dmaps, dD, dbias
        if isinstance(plan, plans.StepLanes):
            backs = new(max(segments - 1, 1), b, k, d, n), new(max(segments - 1, 1), b, k, d)
            arguments = *arguments, *backs, k, length, d, per, *inputs.strides
        else:
            arguments = *arguments, k, length, d, *inputs.strides
        if segments > 1:
            find = nvrtc.kernel(BACKWARD[type(plan)], "backs", defines, inputs.device, shared)
            find((b * k * blocks, segments - 1), plan.threads, *arguments)
        run((b * k * blocks, segments), plan.threads, *arguments)
        fold((-(-rows * 2 * n // 256), 1), 256, dmaps, dB, dC, blocks, rows)
    grads = du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0)
    return tuple(None if t is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True))


@cache
def _forward_plan(sequences: int, channels: int, states: int, device: torch.device, length: int) -> plans.StateLanes:
    return plans.forward(sequences, channels, states, gpu_of(device), length)


@cache
def _backward_plan(sequences: int, channels: int, states: int, device: torch.device, length: int) -> Plan:
    return plans.backward(sequences, channels, states, gpu_of(device), length)


def _backward_defines(plan: Plan, states: int, has_z: bool, length: int) -> tuple[int, tuple[str, ...]]:
    """Bytes of shared memory, and what the compiler is told beside the inputs."""
    if isinstance(plan, plans.StateLanes):
        shared = plan.shared_bytes(has_z)
        return shared, (f"BYTES={shared}",)
    shared = plan.shared_bytes(states, has_z)
    tail = plans.tail(length) if plan.segments == 1 else CHUNK // plans.STEP_LANES
    return shared, (f"BYTES={shared}", f"TAIL={tail}")


class Inputs:
    """u, delta, A, B, C, D, z, bias as the kernels read them.

    Args:
        tensors: these. softplus: whether delta goes through it.
    """

    def __init__(self, tensors: tuple[Any, ...], softplus: bool):
        u, delta, A, B, C, D, z, bias = tensors
        self.none, self.device = u, u.device.index  # a pointer that is not read
        flags = D is not None, z is not None, bias is not None, softplus
        u, delta, z = (self.none if t is None else t.to(u.dtype).contiguous() for t in (u, delta, z))
        rates, skip, shift = (self.none if t is None else t.float().contiguous() for t in (A, D, bias))
        self.tensors, self.strides = (u, delta, rates, B, C, skip, z, shift), (*B.stride(), *C.stride())
        wide = 1 if u.shape[-1] % 2 or any(t.data_ptr() % (2 * u.itemsize) for t in (u, delta, z)) else 2
        self.key = u.dtype, A.shape[-1], wide, _side_by_side(B) and _side_by_side(C), flags

    def defines(self, plan: Plan) -> tuple[str, ...]:
        """What the compiler is told."""
        return _defines((f"S={plan.share}", *plan.defines()), math.gcd(plan.share, 4), *self.key)


@cache
def _defines(
    plan: tuple[str, ...], most: int, dtype: torch.dtype, n: int, wide: int, together: bool, flags: tuple[bool, ...]
) -> tuple[str, ...]:
    sizes = f"N={n}", f"WIDE={wide}", f"MAPS={most if together else 1}"
    given = (f"{name}={int(flag)}" for name, flag in zip(FLAGS, flags, strict=True))
    return TYPES[dtype], *sizes, *plan, *given


def _side_by_side(t: Tensor) -> bool:
    """Whether 4 states' numbers of B or C can be read at once, from any state that 4 divides."""
    aligned = not t.data_ptr() % (4 * t.itemsize) and not any(size % 4 for size in (t.shape[-1], *t.stride()[:-1]))
    return aligned and t.stride(-1) == 1

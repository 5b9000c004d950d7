"""Fused 2D selective scan in CUDA C++ (``scan2d*.cu``), forward and backward, for float16 and bfloat16 maps.

With several states both have kernels of their own: ``scan2d_lanes.cu``, whose work ``scan2d_plan`` shares out, and
``scan2d_lanes_backward.cu``, where it fits. The equation and its letters are in ``scan2d_reference``. It is about twice
as fast as the Triton kernels, which take what this backend refuses. There are no atomics: sums over blocks of channels,
over b and over routes that run side by side are taken from slices, in a fixed order.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.kernels import nvrtc
from vmamba.kernels import scan2d_plan as plans
from vmamba.kernels.backends import other_types
from vmamba.kernels.scan2d_backward_plan import Lanes, lanes, spread
from vmamba.kernels.selective_scan_cuda import gpu_of

SOURCE = Path(__file__).with_name("scan2d.cu")
LANES_FORWARD = SOURCE.with_name("scan2d_lanes.cu")
LANES_BACKWARD, SUMS = SOURCE.with_name("scan2d_lanes_backward.cu"), SOURCE.with_name("scan2d_totals.cu")
TYPES = {torch.bfloat16: "T_BF16", torch.float16: "T_FP16"}
THREADS, CHANNELS, TILE = 256, 32, 64  # of a block; TILE = CHUNK, so that a tile starts from a state that was kept
PROGRAMS = 256  # fewer than this do not fill a large GPU: routes then get programs of their own
SHORT = 256  # steps; shorter routes are not worth the sum over programs
SEVERAL = 4  # states that lanes can share
MOST = 64  # states, and ranks, that fit in shared memory
TOTALS, EACH = 1024, 1024  # blocks for a sum at most, and numbers that a block sums at once
FORWARD_BLOCKS, BACKWARD_BLOCKS = 3, 2  # per multiprocessor, which bounds registers; measured on an H200


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors (x, projected, dt_proj, A, ...) can be scanned; the device is ``backends``' business."""
    wrong = other_types(tensors[:2], tuple(TYPES)) or nvrtc.why_not()
    return wrong or (_wrong_size(*tensors) if len(tensors) > 1 else None)


def _wrong_size(x: Tensor, projected: Tensor, dt_proj: Tensor, A: Tensor, *rest: Tensor) -> str | None:
    n, rank = A.shape[-1], dt_proj.shape[-1]
    if x.dtype != projected.dtype:
        return f"it takes x and projected of one type, got {x.dtype} and {projected.dtype}"
    if max(n, rank) > MOST:
        return f"it takes up to {MOST} states and ranks, got {n} and {rank}"
    if x.shape[-1] % 8:
        return f"it takes channels in multiples of 8, got {x.shape[-1]}"
    if x.shape[1] * max(x.shape[2], projected.shape[2] * projected.shape[3]) >= 2**29:
        return f"it takes maps of less than 2^29 numbers, got {tuple(x.shape[1:])}"
    return None


def forward(
    x: Tensor, projected: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor, bias: Tensor, routes: Tensor, inverse: Tensor,
    log_A: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b, p, d) and the states before each chunk (b, k, chunks, d, n), both float32; A may be log(-A)."""
    (b, _, d), (k, length) = x.shape, routes.shape
    states = x.new_empty(b, k, -(-length // TILE), d, A.shape[-1], dtype=torch.float32)
    return _run(states, x, projected, dt_proj, A, D, bias, routes, log_A), states


def values(
    x: Tensor, projected: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor, bias: Tensor, routes: Tensor, inverse: Tensor,
    log_A: bool = False,
) -> Tensor:  # fmt: skip
    """y alone, as :func:`forward` has it. With several states, none are kept for a backward."""
    tensors = x, projected, dt_proj, A, D, bias, routes
    return _run(None, *tensors, log_A) if A.shape[-1] >= SEVERAL else forward(*tensors, inverse, log_A)[0]


def _run(
    states: Tensor | None, x: Tensor, projected: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor, bias: Tensor,
    routes: Tensor, log_A: bool,
) -> Tensor:  # fmt: skip
    """y; the states before each chunk are kept where there is room for them."""
    (b, p, d), (k, length), n, rank = x.shape, routes.shape, A.shape[-1], dt_proj.shape[-1]
    tensors = *_inputs(x, projected), *_weights(dt_proj, A, D, bias), routes
    setting, shares = (x.dtype, n, rank, length == p, x.device.index, log_A), _new(x, length == p)
    if n < SEVERAL:
        groups, blocks = _grid(x, k, length)
        run, threads = _kernel("forward", *setting), THREADS
    else:
        plan = _plan(b, d, n, k, x.device)
        groups, blocks, threads = plan.groups, plan.blocks(b, d), plan.threads
        run = _forward_kernel(plan, states is not None, *setting)
    y = shares(groups, b, p, d, dtype=torch.float32)
    run((blocks, groups), threads, *tensors, y, y if states is None else states, p, k, length, d, k // groups, b)
    return _total(y)


def backward(
    dy: Tensor,
    states: Tensor,
    routes: Tensor,
    inverse: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    log_A: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of x, projected, dt_proj, A (log(-A) where that was given), D, bias, each in its tensor's dtype."""
    tensors = x, projected, dt_proj, A, D, bias
    (b, p, d), (k, length), n, rank = x.shape, routes.shape, A.shape[-1], dt_proj.shape[-1]
    maps, weights = _inputs(x, projected), _weights(dt_proj, A, D, bias)
    launch = _backward(x, n, rank, k, length, log_A)
    (count, groups), new, whole = launch.grid, states.new_empty, _new(states, length == p)
    dx, dprojected = whole(groups, b, p, d), whole(count // b, b, *projected.shape[1:])
    parts = dx, dprojected, new(b, k, launch.cuts, d, rank), new(b, k, d, n), new(b, k, d), new(b, k, d)
    inputs = _aligned(dy.contiguous()), states, *maps, *weights, routes
    launch.run(launch.grid, launch.threads, *inputs, *parts, p, k, length, d, *launch.turns, b)
    grads = [new(t.shape, dtype=kind) for t, kind in zip(tensors, (x.dtype,) * 2 + (torch.float32,) * 4, strict=True)]
    size = min(TOTALS, -(-max(grads[0].numel(), grads[1].numel()) // EACH)), len(grads)
    add = nvrtc.kernel(SUMS, "totals", _sizes(x.dtype, n, rank, log_A), x.device.index)
    add(size, THREADS, *parts, weights[1], *grads, p, k, d, groups, count // b, launch.cuts, b)
    return tuple(g.to(t.dtype) for g, t in zip(grads, tensors, strict=True))


class _Launch(NamedTuple):
    """Of a backward.

    Args:
        grid: blocks of channels and samples, and groups of routes. turns: what a block does one after the other, routes
            and, in the kernel for several states, groups of channels. cuts: parts of dt_proj's gradient of a route.
    """

    run: nvrtc.Kernel
    grid: tuple[int, int]
    threads: int
    turns: tuple[int, ...]
    cuts: int


def _backward(x: Tensor, n: int, rank: int, k: int, length: int, log_A: bool) -> _Launch:
    """By the kernel for several states, or, where they do not fit, by the one for few."""
    (b, p, d), gpu = x.shape, gpu_of(x.device)
    setting, plan = (x.dtype, n, rank, length == p, x.device.index, log_A), lanes(n, rank, gpu.shared)
    if plan is None:
        groups, blocks = _grid(x, k, length)
        cuts = max(1, 8 // (2 * _ranks(rank)))
        return _Launch(_kernel("backward", *setting), (blocks, groups), THREADS, (k // groups,), cuts)
    groups, across, span = spread(plan, b, d, k, gpu)
    run = _lanes_kernel(plan, x.dtype, length == p, span > 1, x.device.index, log_A)
    return _Launch(run, (b * across, groups), plan.threads, (k // groups, span), 1)


@cache
def _lanes_kernel(plan: Lanes, dtype: torch.dtype, whole: bool, spans: bool, device: int, log_A: bool) -> nvrtc.Kernel:
    told = backward_defines(plan, dtype, whole, spans, log_A)
    return nvrtc.kernel(LANES_BACKWARD, "backward", told, device, plan.shared_bytes)


def backward_defines(plan: Lanes, dtype: torch.dtype, whole: bool, spans: bool, log_A: bool = False) -> tuple[str, ...]:
    """The compile-time settings of the backward for several states."""
    flags = f"WHOLE={int(whole)}", f"SPANS={int(spans)}"
    return *_sizes(dtype, plan.states, plan.rank, log_A), *flags, *plan.defines()


@cache
def _kernel(
    name: str, dtype: torch.dtype, n: int, rank: int, whole: bool, device: int, log_A: bool = False
) -> nvrtc.Kernel:
    forward_bytes, backward_bytes = shared_bytes(n, rank)
    shared = {"forward": forward_bytes, "backward": backward_bytes}
    return nvrtc.kernel(SOURCE, name, defines(dtype, n, rank, whole, log_A), device, shared[name])


@cache
def _plan(samples: int, channels: int, states: int, routes: int, device: torch.device) -> plans.Lanes:
    return plans.forward(samples, channels, states, routes, gpu_of(device).processors)


@cache
def _forward_kernel(
    plan: plans.Lanes, keep: bool, dtype: torch.dtype, n: int, rank: int, whole: bool, device: int, log_A: bool
) -> nvrtc.Kernel:
    defines = forward_defines(plan, keep, dtype, n, rank, whole, log_A)
    return nvrtc.kernel(LANES_FORWARD, "forward", defines, device, plan.shared_bytes(n, rank))


def forward_defines(
    plan: plans.Lanes, keep: bool, dtype: torch.dtype, n: int, rank: int, whole: bool, log_A: bool = False
) -> tuple[str, ...]:
    """The compile-time settings of the forward for several states."""
    flags = f"WHOLE={int(whole)}", f"KEEP={int(keep)}"
    return *_sizes(dtype, n, rank, log_A), *flags, *plan.defines(n, rank)


def defines(dtype: torch.dtype, n: int, rank: int, whole: bool, log_A: bool = False) -> tuple[str, ...]:
    """The compile-time settings of the source."""
    forward_bytes, backward_bytes = shared_bytes(n, rank)
    shared = f"FORWARD_BYTES={forward_bytes}", f"BACKWARD_BYTES={backward_bytes}"
    limits = f"FORWARD_BLOCKS={FORWARD_BLOCKS}", f"BACKWARD_BLOCKS={BACKWARD_BLOCKS}"
    return *_sizes(dtype, n, rank, log_A), f"WHOLE={int(whole)}", *shared, *limits


def _sizes(dtype: torch.dtype, n: int, rank: int, log_A: bool) -> tuple[str, ...]:
    return TYPES[dtype], f"N={n}", f"R={rank}", f"LOG_A={int(log_A)}"


def shared_bytes(n: int, rank: int) -> tuple[int, int]:
    """Of a block's shared memory in the forward and in the backward: the source's structures of these names."""
    weight, deltas, pairs = _ranks(rank) * 1024, 8 * 8 * 36 * 4, 8 * 8 * 2 * n * 4
    chain, carry = 2 * 8 * CHANNELS * 8, 2 * n * CHANNELS * 4
    back, factors = -(-rank // 16) * 2048, 2 * TILE * (8 * _ranks(rank) + 2) * 2
    sums = chain // 2 + 8 * (n + 2) * CHANNELS * 4
    once = weight + deltas + pairs + chain + carry + 8 * 8 * CHANNELS * (2 + 4)
    return once, once + back + deltas + factors + sums + 8 * 8 * CHANNELS * 4


def _grid(x: Tensor, k: int, length: int) -> tuple[int, int]:
    """Groups of routes that run side by side, and blocks of channels and samples."""
    blocks = x.shape[0] * -(-x.shape[2] // CHANNELS)
    if length <= SHORT:
        return 1, blocks
    return next(g for g in range(1, k + 1) if k % g == 0 and (blocks * g >= PROGRAMS or g == k)), blocks


def _ranks(rank: int) -> int:
    """Tiles of 8 ranks."""
    return -(-rank // 8)


def _inputs(*tensors: Tensor) -> list[Tensor]:
    return [_aligned(t.contiguous()) for t in tensors]


def _aligned(t: Tensor) -> Tensor:
    return t.clone() if t.data_ptr() % 16 else t  # kernels read 16 bytes at once


def _weights(*tensors: Tensor) -> list[Tensor]:
    return [t.float().contiguous() for t in tensors]


def _new(like: Tensor, whole: bool):
    """Makes tensors: zeros where the kernel may leave gaps."""
    return like.new_empty if whole else like.new_zeros


def _total(slices: Tensor) -> Tensor:
    return slices[0] if len(slices) == 1 else slices.sum(0)

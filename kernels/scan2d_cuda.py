"""Fused 2D selective scan in CUDA C++ (``scan2d*.cu``), forward and backward, for float16 and bfloat16 maps.

With several states both have kernels of their own: ``scan2d_lanes.cu``, whose work ``scan2d_plan`` shares out, and
``scan2d_lanes_backward.cu``, where it fits. Few long sequences are cut into segments, whose ends ``scan2d_ends.cu``
finds. The equation and its letters are in ``scan2d_reference``. It is about twice as fast as the Triton kernels, which
take what this backend refuses. There are no atomics: sums over blocks of channels, over b, over segments and over
routes that run side by side are taken from slices, in a fixed order.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.kernels import nvrtc
from vmamba.kernels import scan2d_plan as plans
from vmamba.kernels import scan2d_segments as segments
from vmamba.kernels.backends import other_types
from vmamba.kernels.gpu import gpu_of
from vmamba.kernels.scan2d_backward_plan import Lanes, lanes, spread
from vmamba.kernels.scan2d_segments import Cut, Scan

SOURCE = Path(__file__).with_name("scan2d.cu")
LANES_FORWARD = SOURCE.with_name("scan2d_lanes.cu")
LANES_BACKWARD, SUMS = SOURCE.with_name("scan2d_lanes_backward.cu"), SOURCE.with_name("scan2d_totals.cu")
ENDS = SOURCE.with_name("scan2d_ends.cu")
TYPES = {torch.bfloat16: "T_BF16", torch.float16: "T_FP16"}
THREADS, CHANNELS, TILE = 256, 32, 64  # of a block; TILE = CHUNK, so that a tile starts from a state that was kept
PROGRAMS = 256  # fewer than this do not fill a large GPU: routes then get programs of their own
SHORT = 256  # steps; shorter routes are not worth the sum over programs
SEVERAL = 4  # states that lanes can share
MOST = 64  # states, and ranks, that fit in shared memory
TOTALS, EACH = 1024, 1024  # blocks for a sum at most, and numbers that a block sums at once
FORWARD_BLOCKS, BACKWARD_BLOCKS = 3, 2  # per multiprocessor, which bounds registers; measured on an H200
# of few states: these, ns of a step, and more for each block of a multiprocessor
STEP = {"forward": (FORWARD_BLOCKS, 3, 14), "backward": (BACKWARD_BLOCKS, 9, 22)}


class Weights(NamedTuple):
    """As the kernels read them: float32."""

    dt_proj: Tensor
    A: Tensor
    D: Tensor
    bias: Tensor


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
    maps, weights = _inputs(x, projected), _weights(dt_proj, A, D, bias)
    setting, scan = (x.dtype, n, rank, length == p, x.device.index, log_A), Scan(b, d, n, rank, k, length)
    if n < SEVERAL:
        groups, blocks, cuts = _grid("forward", scan, x.device)
        run, threads = _kernel("forward", *setting, cuts > 1), THREADS
    else:
        plan = _plan(scan, x.device)
        groups, blocks, threads, cuts = plan.groups, plan.blocks(b, d), plan.threads, plan.segments
        run = _forward_kernel(plan, states is not None, *setting)
    cut = segments.cut(length, cuts)
    ends = _ends("ends", *maps, weights, routes, cut, log_A)
    y = _new(x, length == p)(groups, b, p, d, dtype=torch.float32)
    inputs, sizes = (*maps, *weights, routes), (p, k, length, d, k // groups, cut.per, b)
    run((blocks, groups * cut.count), threads, *inputs, y, y if states is None else states, *ends, *sizes)
    return _total(y)


def _ends(
    name: str, values: Tensor, projected: Tensor, weights: Weights, routes: Tensor, cut: Cut, log_A: bool
) -> tuple[Tensor, Tensor]:
    """What segments make of nothing (segments - 1, b, k, d, n), and sums of their step sizes (..., d).

    Of x (``ends``), but for the last segment, or of dy (``backs``), but for the first. Where there is one segment,
    tensors that are not read.
    """
    (b, p, d), (k, length), (n, rank) = values.shape, routes.shape, (weights.A.shape[-1], weights.dt_proj.shape[-1])
    count = cut.count - 1
    if not count:
        return weights.A, weights.A
    states, sums = weights.A.new_empty(count, b, k, d, n), weights.A.new_empty(count, b, k, d)
    defines = *_sizes(projected.dtype, n, rank, log_A), f"WHOLE={int(length == p)}"
    run = nvrtc.kernel(ENDS, name, defines, values.device.index)
    grid = b * -(-d // segments.CHANNELS), k * count * -(-n // segments.STATES)
    inputs = values, projected, weights.dt_proj, weights.A, weights.bias, routes
    run(grid, THREADS, *inputs, states, sums, p, k, length, d, cut.per, count, b)
    return states, sums


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
    maps, weights, dy = _inputs(x, projected), _weights(dt_proj, A, D, bias), _aligned(dy.contiguous())
    launch = _backward(x, n, rank, k, length, log_A)
    groups, across, cut = launch.groups, launch.across, launch.cut
    new, whole = states.new_empty, _new(states, length == p)
    dx, dprojected = whole(groups, b, p, d), whole(across, b, *projected.shape[1:])
    sums = (k, launch.pieces, d, rank), (k, d, n), (k, d), (k, d)
    parts = dx, dprojected, *(new(cut.count * b, *size) for size in sums)
    ends = _ends("backs", dy, maps[1], weights, routes, cut, log_A)
    inputs, sizes = (dy, states, *maps, *weights, routes), (p, k, length, d, *launch.turns, cut.per, b)
    launch.run((b * across, groups * cut.count), launch.threads, *inputs, *parts, *ends, *sizes)
    grads = [new(t.shape, dtype=kind) for t, kind in zip(tensors, (x.dtype,) * 2 + (torch.float32,) * 4, strict=True)]
    size = min(TOTALS, -(-max(grads[0].numel(), grads[1].numel()) // EACH)), len(grads)
    add = nvrtc.kernel(SUMS, "totals", _sizes(x.dtype, n, rank, log_A), x.device.index)
    add(size, THREADS, *parts, weights.A, *grads, p, k, d, groups, across, launch.pieces, cut.count, b)
    return tuple(g.to(t.dtype) for g, t in zip(grads, tensors, strict=True))


class _Launch(NamedTuple):
    """Of a backward.

    Args:
        groups, across: side by side, of routes, and blocks of channels. turns: what a block does one after the other,
            routes and, in the kernel for several states, groups of channels. cut: a route's segments. pieces: of
            dt_proj's gradient of a route.
    """

    run: nvrtc.Kernel
    groups: int
    across: int
    threads: int
    turns: tuple[int, ...]
    cut: Cut
    pieces: int


def _backward(x: Tensor, n: int, rank: int, k: int, length: int, log_A: bool) -> _Launch:
    """By the kernel for several states, or, where they do not fit, by the one for few."""
    (b, p, d), gpu = x.shape, gpu_of(x.device)
    setting, scan = (x.dtype, n, rank, length == p, x.device.index, log_A), Scan(b, d, n, rank, k, length)
    plan = lanes(n, rank, gpu.shared)
    if plan is None:
        groups, blocks, cuts = _grid("backward", scan, x.device)
        pieces, cut = max(1, 8 // (2 * _ranks(rank))), segments.cut(length, cuts)
        run = _kernel("backward", *setting, cuts > 1)
        return _Launch(run, groups, blocks // b, THREADS, (k // groups,), cut, pieces)
    groups, across, span, cuts = spread(plan, scan, gpu)
    run = _lanes_kernel(plan, x.dtype, length == p, span > 1, cuts > 1, x.device.index, log_A)
    return _Launch(run, groups, across, plan.threads, (k // groups, span), segments.cut(length, cuts), 1)


@cache
def _lanes_kernel(
    plan: Lanes, dtype: torch.dtype, whole: bool, spans: bool, cut: bool, device: int, log_A: bool
) -> nvrtc.Kernel:
    told = backward_defines(plan, dtype, whole, spans, cut, log_A)
    return nvrtc.kernel(LANES_BACKWARD, "backward", told, device, plan.shared_bytes)


def backward_defines(
    plan: Lanes, dtype: torch.dtype, whole: bool, spans: bool, cut: bool = False, log_A: bool = False
) -> tuple[str, ...]:
    """The compile-time settings of the backward for several states."""
    flags = f"WHOLE={int(whole)}", f"SPANS={int(spans)}", f"CUT={int(cut)}"
    return *_sizes(dtype, plan.states, plan.rank, log_A), *flags, *plan.defines()


@cache
def _kernel(
    name: str, dtype: torch.dtype, n: int, rank: int, whole: bool, device: int, log_A: bool, cut: bool
) -> nvrtc.Kernel:
    forward_bytes, backward_bytes = shared_bytes(n, rank)
    shared = {"forward": forward_bytes, "backward": backward_bytes}
    return nvrtc.kernel(SOURCE, name, defines(dtype, n, rank, whole, log_A, cut), device, shared[name])


@cache
def _plan(scan: Scan, device: torch.device) -> plans.Lanes:
    return plans.forward(scan, gpu_of(device))


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
    flags = f"WHOLE={int(whole)}", f"CUT={int(plan.segments > 1)}", f"KEEP={int(keep)}"
    return *_sizes(dtype, n, rank, log_A), *flags, *plan.defines(n, rank)


def defines(
    dtype: torch.dtype, n: int, rank: int, whole: bool, log_A: bool = False, cut: bool = False
) -> tuple[str, ...]:
    """The compile-time settings of the source."""
    forward_bytes, backward_bytes = shared_bytes(n, rank)
    shared = f"FORWARD_BYTES={forward_bytes}", f"BACKWARD_BYTES={backward_bytes}"
    limits = f"FORWARD_BLOCKS={FORWARD_BLOCKS}", f"BACKWARD_BLOCKS={BACKWARD_BLOCKS}"
    return *_sizes(dtype, n, rank, log_A), f"WHOLE={int(whole)}", f"CUT={int(cut)}", *shared, *limits


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


@cache
def _grid(name: str, scan: Scan, device: torch.device) -> tuple[int, int, int]:
    """Groups of routes that run side by side, blocks of channels and samples, and segments, for few states."""
    blocks, k, length = scan.samples * -(-scan.channels // CHANNELS), scan.routes, scan.length
    if length <= SHORT:
        return 1, blocks, 1
    groups = next(g for g in range(1, k + 1) if k % g == 0 and (blocks * g >= PROGRAMS or g == k))
    if groups < k:
        return groups, blocks, 1
    (resident, step, more), processors = STEP[name], gpu_of(device).processors

    def time(count: int) -> float:
        each = segments.busy(blocks * k * count, resident, processors, lambda beside: step + more * beside)
        return each * segments.walk(length, count) + segments.ends(scan, processors, count)

    return groups, blocks, min(segments.counts(blocks * k, resident, processors, length), key=time)


def _ranks(rank: int) -> int:
    """Tiles of 8 ranks."""
    return -(-rank // 8)


def _inputs(x: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    return _aligned(x.contiguous()), _aligned(projected.contiguous())


def _aligned(t: Tensor) -> Tensor:
    return t.clone() if t.data_ptr() % 16 else t  # kernels read 16 bytes at once


def _weights(dt_proj: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Weights:
    return Weights(*(t.float().contiguous() for t in (dt_proj, A, D, bias)))


def _new(like: Tensor, whole: bool):
    """Makes tensors: zeros where the kernel may leave gaps."""
    return like.new_empty if whole else like.new_zeros


def _total(slices: Tensor) -> Tensor:
    return slices[0] if len(slices) == 1 else slices.sum(0)

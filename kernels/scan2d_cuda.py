"""Fused 2D selective scan in CUDA C++ (``scan2d.cu``), forward and backward, for float16 and bfloat16 maps.

The equation and its letters are in ``scan2d_reference``. It is about twice as fast as the Triton kernels, which take
what this backend refuses. There are no atomics: sums over blocks of channels, over b and over routes that run side by
side are taken from slices, in a fixed order.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vmamba.kernels import nvrtc
from vmamba.kernels.backends import other_types

SOURCE = Path(__file__).with_name("scan2d.cu")
TYPES = {torch.bfloat16: "T_BF16", torch.float16: "T_FP16"}
THREADS, CHANNELS, TILE = 256, 32, 64  # of a block; TILE = CHUNK, so that a tile starts from a state that was kept
PROGRAMS = 256  # fewer than this do not fill a large GPU: routes then get programs of their own
SHORT = 256  # steps; shorter routes are not worth the sum over programs
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
    (b, p, d), (k, length), n = x.shape, routes.shape, A.shape[-1]
    maps, weights = _inputs(x, projected), _weights(dt_proj, A, D, bias)
    groups, blocks = _grid(x, k, length)
    y = _new(x, length == p)(groups, b, p, d, dtype=torch.float32)
    states = x.new_empty(b, k, -(-length // TILE), d, n, dtype=torch.float32)
    run = _kernel("forward", x.dtype, n, dt_proj.shape[-1], length == p, x.device.index, log_A)
    run((blocks, groups), THREADS, *maps, *weights, routes, y, states, p, k, length, d, k // groups, b)
    return _total(y), states


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
    groups, blocks = _grid(x, k, length)
    new, setting = states.new_empty, (x.dtype, n, rank, length == p, x.device.index, log_A)
    dx = _new(states, length == p)(groups, b, p, d)
    dprojected = _new(states, length == p)(blocks // b, b, *projected.shape[1:])
    ddt_proj = new(b, k, max(1, 8 // (2 * _ranks(rank))), d, rank)
    parts = dx, dprojected, ddt_proj, new(b, k, d, n), new(b, k, d), new(b, k, d)
    _kernel("backward", *setting)(
        (blocks, groups), THREADS, dy.contiguous(), states, *maps, *weights, routes, *parts,
        p, k, length, d, k // groups, b,
    )  # fmt: skip
    grads = [new(t.shape, dtype=kind) for t, kind in zip(tensors, (x.dtype,) * 2 + (torch.float32,) * 4, strict=True)]
    size = min(TOTALS, -(-max(grads[0].numel(), grads[1].numel()) // EACH)), len(grads)
    _kernel("totals", *setting)(size, THREADS, *parts, weights[1], *grads, p, k, d, groups, b)
    return tuple(g.to(t.dtype) for g, t in zip(grads, tensors, strict=True))


@cache
def _kernel(
    name: str, dtype: torch.dtype, n: int, rank: int, whole: bool, device: int, log_A: bool = False
) -> nvrtc.Kernel:
    forward_bytes, backward_bytes = shared_bytes(n, rank)
    shared = {"forward": forward_bytes, "backward": backward_bytes, "totals": 0}
    return nvrtc.kernel(SOURCE, name, defines(dtype, n, rank, whole, log_A), device, shared[name])


def defines(dtype: torch.dtype, n: int, rank: int, whole: bool, log_A: bool = False) -> tuple[str, ...]:
    """The compile-time settings of the source."""
    forward_bytes, backward_bytes = shared_bytes(n, rank)
    sizes = f"N={n}", f"R={rank}", f"WHOLE={int(whole)}", f"LOG_A={int(log_A)}"
    shared = f"FORWARD_BYTES={forward_bytes}", f"BACKWARD_BYTES={backward_bytes}"
    return TYPES[dtype], *sizes, *shared, f"FORWARD_BLOCKS={FORWARD_BLOCKS}", f"BACKWARD_BLOCKS={BACKWARD_BLOCKS}"


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
    return [t.contiguous() for t in tensors]


def _weights(*tensors: Tensor) -> list[Tensor]:
    return [t.float().contiguous() for t in tensors]


def _new(like: Tensor, whole: bool):
    """Makes tensors: zeros where the kernel may leave gaps."""
    return like.new_empty if whole else like.new_zeros


def _total(slices: Tensor) -> Tensor:
    return slices[0] if len(slices) == 1 else slices.sum(0)

"""Segments of few long routes of the fused 2D scan, in Triton: what each makes of nothing, and what enters the next.

A step multiplies by exp(delta A), so a segment by exp(A sum delta): its end and the sum of its step sizes say all. The
scan of all segments at once (``scan2d_triton``) starts each from what those before it leave, the backward its adjoint
from what those after it leave. Tiles are those of ``scan2d_triton``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels.scan2d_segments import Cut
from vmamba.kernels.selective_scan_triton import STEPS, _scan, _step_size

LOG2E = tl.constexpr(1.4426950408889634)
TILE = {"S": 8, "BD": 16, "num_warps": 4, "maxnreg": 128}  # S segments of a tile x STEPS x BD channels
_jit = triton.jit(do_not_specialize=["p", "k", "length", "d", "per", "count", "rows"])


@triton.jit
def part_of_route(program, k, full, per, CUT: tl.constexpr):
    """What a program scans: its route (of all k, where they are cut), which segment, its first step, its steps."""
    nth = 0
    if CUT:
        nth = program // k
        program = program % k
    return program, nth, nth * per, min(per, full - nth * per) if CUT else full


@triton.jit
def entering(ends, sums, count, row, stride, c, d, n, N: tl.constexpr, rate, in_c):
    """State n (BD) after ``count`` segments, whose rows are ``stride`` apart from ``row`` on; rate is A log2(e)."""
    h = tl.zeros(rate.shape, rate.dtype)
    for segment in range(0, count):
        at = (row + segment * stride) * d + c
        decay = tl.exp2(tl.load(sums + at, in_c, 0) * rate)
        h = decay * h + tl.load(ends + at * N + n, in_c, 0)
    return h


@_jit
def _ends_kernel(
    values, projected, dt_proj, A, bias, routes, ends, sums,
    p, k, length, d, per, count, rows,
    FORWARD: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    real = ends.dtype.element_ty
    W: tl.constexpr = R + 2 * N
    blocks = tl.cdiv(d, BD)
    c = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    bi = (tl.program_id(0) // blocks).to(tl.int64)
    ki = tl.program_id(1) % k
    end = tl.program_id(1) // k
    first = (end if FORWARD else end + 1) * per  # the last segment's end is not asked for, nor the first's adjoint
    stop = min(first + per, length)
    segment = tl.arange(0, S)[:, None]
    t = segment * STEPS + tl.arange(0, STEPS)[None, :]  # (S, T)
    flat = tl.arange(0, S * STEPS)
    rank = tl.arange(0, RANKS)
    in_c = c < d
    values += bi * p * d
    own = projected + bi * p * k * W + ki * W
    route = routes + ki * length
    to = ((end * rows + bi) * k + ki) * d + c
    shift = tl.load(bias + ki * d + c, in_c, 0).to(real)[None, None, :]
    weight = tl.load(dt_proj + (ki * d + c)[None, :] * R + rank[:, None], in_c[None, :] & (rank < R)[:, None], 0)
    h = tl.zeros([BD], real)
    total = tl.zeros([BD], real)
    for walked in range(0, per, S * STEPS):
        start = first + (walked if FORWARD else per - S * STEPS - walked)
        in_l = start + t < stop
        pixel = tl.load(route + start + t, in_l, p)
        in_t = in_l & (pixel < p)
        value = tl.load(values + pixel[:, :, None] * d + c[None, None, :], in_t[:, :, None] & in_c[None, None, :], 0)
        line = tl.load(route + start + flat, start + flat < stop, p)
        factor = tl.load(own + line[:, None] * k * W + rank[None, :], (line < p)[:, None] & (rank < R)[None, :], 0)
        raw = tl.dot(factor.to(weight.dtype), weight, input_precision=PRECISION)
        raw = tl.reshape(raw, [S, STEPS, BD]).to(real) + shift
        step, _slope = _step_size(raw, in_l[:, :, None] & in_c[None, None, :], True)
        total += tl.sum(tl.sum(step, 1), 0)
        push = value.to(real)
        if FORWARD:
            push *= step
        for n in range(N):
            rate = tl.load(A + (ki * d + c) * N + n, in_c, 0).to(real) * LOG2E
            M = tl.load(own + pixel * k * W + R + (n if FORWARD else N + n), in_t, 0).to(real)[:, :, None]
            a = tl.exp2(step * rate[None, None, :])
            gain = push * M if FORWARD else a * (push * M)
            if N > 1:
                h = tl.load(ends + to * N + n, in_c & (walked > 0), 0)
            _first, _before, h = _scan(a, gain, h, segment, S, BD, not FORWARD)
            if N > 1:
                tl.store(ends + to * N + n, h, in_c)
        if N > 1:
            tl.debug_barrier()  # the next tile reads the states of this one
    if N == 1:
        tl.store(ends + to, h, in_c)
    tl.store(sums + to, total, in_c)


def find(
    forward: bool, values: Tensor, projected: Tensor, dt_proj: Tensor, A: Tensor, bias: Tensor, routes: Tensor, cut: Cut
) -> tuple[Tensor, Tensor]:
    """Ends (segments - 1, b, k, d, n), and sums of step sizes (..., d), where there are several segments.

    Args: values: x, for states: all segments but the last; or dy, for adjoints: all but the first. Contiguous tensors.
    """
    (b, p, d), (k, length), n, rank = values.shape, routes.shape, A.shape[-1], dt_proj.shape[-1]
    count = cut.count - 1
    ends, sums = (A.new_empty(count, b, k, *shape, dtype=torch.float32) for shape in ((d, n), (d,)))
    _ends_kernel[b * triton.cdiv(d, TILE["BD"]), k * count](
        values, projected, dt_proj, A, bias, routes, ends, sums, p, k, length, d, cut.per, count, b,
        FORWARD=forward, **projection(projected, n, rank), **TILE,
    )  # fmt: skip
    return ends, sums


def projection(x: Tensor, n: int, rank: int) -> dict[str, Any]:
    """The constants of a kernel that projects delta from x's map."""
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
    return {"N": n, "R": rank, "RANKS": max(16, triton.next_power_of_2(rank)), "PRECISION": precision}

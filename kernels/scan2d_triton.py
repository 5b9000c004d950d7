"""Fused 2D selective scan in Triton, forward and backward; the equation and its letters are in ``scan2d_reference``.

A program scans BD channels of one sample along some of its routes, one after the other, and adds each route to the
program's own slice of y: no atomics, and nothing of size k * d * l in memory. Where that makes too few programs, groups
of routes get slices of their own, which are summed at the end in a fixed order. Tiles, segments and the recurrence in a
tile are those of ``selective_scan_triton``; delta is projected inside the tile, as a matrix product over the rank.
A route must not visit a pixel twice (``Table.once``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels.selective_scan_reference import CHUNK
from vmamba.kernels.selective_scan_triton import STEPS, _on, _scan, _step_size

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PROGRAMS = 256  # fewer than this do not fill a large GPU: routes then get programs of their own
# Tiles of S segments x STEPS x BD channels, measured on an H200; only one state fits in registers from tile to tile.
WIDE = {"S": 4, "BD": 32, "num_warps": 4, "maxnreg": 128}  # forward, one state, many programs
LONG = {"S": 8, "BD": 16, "num_warps": 4, "maxnreg": 128}  # forward, else
BACK = {"S": 8, "BD": 16, "num_warps": 4, "maxnreg": 255}  # S * STEPS = CHUNK: a tile starts from a state that was kept
LOG2E = tl.constexpr(1.4426950408889634)
_jit = triton.jit(do_not_specialize=["p", "k", "length", "d", "share", "rows"])


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors' types can be scanned; the device is the business of ``backends``."""
    other = {t.dtype for t in tensors} - set(DTYPES)
    return f"it takes {', '.join(map(str, DTYPES))}, not {', '.join(map(str, other))}" if other else None


@_jit
def _forward_kernel(
    x, projected, dt_proj, A, D, bias, routes, y, states,
    p, k, length, d, share, rows,
    N: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    real = y.dtype.element_ty
    W: tl.constexpr = R + 2 * N
    blocks = tl.cdiv(d, BD)
    c = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    bi = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(1)
    segment = tl.arange(0, S)[:, None]
    t = segment * STEPS + tl.arange(0, STEPS)[None, :]  # (S, T)
    flat = tl.arange(0, S * STEPS)
    rank = tl.arange(0, RANKS)
    in_c = c < d
    x += bi * p * d
    y += (group * rows + bi) * p * d
    projected += bi * p * k * W
    for turn in range(share):
        ki = group * share + turn
        route = routes + ki * length
        own = projected + ki * W
        kept = states + (bi * k + ki) * tl.cdiv(length, CHUNK) * d * N + c * N
        skip = tl.load(D + ki * d + c, in_c, 0).to(real)[None, None, :]
        shift = tl.load(bias + ki * d + c, in_c, 0).to(real)[None, None, :]
        weight = tl.load(dt_proj + (ki * d + c)[None, :] * R + rank[:, None], in_c[None, :] & (rank < R)[:, None], 0)
        h = tl.zeros([BD], real)
        for start in range(0, length, S * STEPS):
            in_l = start + t < length
            pixel = tl.load(route + start + t, in_l, p)
            in_t = in_l & (pixel < p)
            inside = in_t[:, :, None] & in_c[None, None, :]
            place = pixel[:, :, None] * d + c[None, None, :]
            ut = tl.load(x + place, inside, 0).to(real)
            line = tl.load(route + start + flat, start + flat < length, p)
            factor = tl.load(own + line[:, None] * k * W + rank[None, :], (line < p)[:, None] & (rank < R)[None, :], 0)
            raw = tl.dot(factor.to(weight.dtype), weight, input_precision=PRECISION)
            raw = tl.reshape(raw, [S, STEPS, BD]).to(real) + shift
            step, _slope = _step_size(raw, in_l[:, :, None] & in_c[None, None, :], True)
            push = step * ut
            out = ut * skip
            for n in range(N):
                rate = tl.load(A + (ki * d + c) * N + n, in_c, 0).to(real) * LOG2E
                Bt = tl.load(own + pixel * k * W + R + n, in_t, 0).to(real)[:, :, None]
                Ct = tl.load(own + pixel * k * W + R + N + n, in_t, 0).to(real)[:, :, None]
                a = tl.exp2(step * rate[None, None, :])
                gain = push * Bt
                if N > 1:
                    h = tl.load(kept + n, in_c & (start > 0), 0)
                if N == 1 or start == 0:
                    tl.store(kept + n, h, in_c & (start % CHUNK == 0))
                _first, before, h = _scan(a, gain, h, segment, S, BD, False)
                out += Ct * (a * before + gain)
                if N > 1:
                    tl.store(kept + d * N + n, h, in_c & (start + S * STEPS < length))
            out += tl.load(y + place, inside & ((turn > 0) | (not WHOLE)), 0)
            tl.store(y + place, out, inside)
            if N > 1:
                tl.debug_barrier()  # the next tile reads the states of this one
            kept += tl.where((start + S * STEPS) % CHUNK == 0, d * N, 0)
        tl.debug_barrier()  # the next route adds to y


@_jit
def _backward_kernel(
    dy, states, x, projected, dt_proj, A, D, bias, routes,
    dx, dprojected, ddt_proj, dA, dD, dbias, carry,
    p, k, length, d, share, rows,
    N: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    real = dy.dtype.element_ty
    W: tl.constexpr = R + 2 * N
    blocks = tl.cdiv(d, BD)
    block = tl.program_id(0) % blocks
    c = block * BD + tl.arange(0, BD)
    bi = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(1)
    segment = tl.arange(0, S)[:, None]
    t = segment * STEPS + tl.arange(0, STEPS)[None, :]  # (S, T)
    flat = tl.arange(0, S * STEPS)
    rank = tl.arange(0, RANKS)
    in_c = c < d
    x += bi * p * d
    dy += bi * p * d
    dx += (group * rows + bi) * p * d
    projected += bi * p * k * W
    dprojected += (block * rows + bi) * p * k * W
    tiles = tl.cdiv(length, S * STEPS)
    for turn in range(share):
        ki = group * share + turn
        row = bi * k + ki
        route = routes + ki * length
        own = projected + ki * W
        grad = dprojected + ki * W
        skip = tl.load(D + ki * d + c, in_c, 0).to(real)[None, None, :]
        shift = tl.load(bias + ki * d + c, in_c, 0).to(real)[None, None, :]
        in_w = in_c[None, :] & (rank < R)[:, None]
        weight = tl.load(dt_proj + (ki * d + c)[None, :] * R + rank[:, None], in_w, 0)  # (RANKS, BD)
        m = tl.zeros([BD], real)
        sum_A = tl.zeros([S, BD], real)
        sum_D = tl.zeros([S, BD], real)
        sum_bias = tl.zeros([S, BD], real)
        sum_w = tl.zeros([RANKS, BD], real)
        for tile in range(0, tiles):
            start = (tiles - 1 - tile) * S * STEPS
            in_l = start + t < length
            steps = in_l[:, :, None] & in_c[None, None, :]
            pixel = tl.load(route + start + t, in_l, p)
            in_t = in_l & (pixel < p)
            inside = in_t[:, :, None] & in_c[None, None, :]
            place = pixel[:, :, None] * d + c[None, None, :]
            ut = tl.load(x + place, inside, 0).to(real)
            g = tl.load(dy + place, inside, 0)
            line = tl.load(route + start + flat, start + flat < length, p)
            in_f = (line < p)[:, None] & (rank < R)[None, :]
            factor = tl.load(own + line[:, None] * k * W + rank[None, :], in_f, 0).to(weight.dtype)
            raw = tl.dot(factor, weight, input_precision=PRECISION)
            step, slope = _step_size(tl.reshape(raw, [S, STEPS, BD]).to(real) + shift, steps, True)
            push = step * ut
            d_push = tl.zeros([S, STEPS, BD], real)
            d_step = tl.zeros([S, STEPS, BD], real)
            kept = states + ((row * tiles + tiles - 1 - tile) * d + c) * N
            for n in range(N):
                rate = tl.load(A + (ki * d + c) * N + n, in_c, 0).to(real)
                Bt = tl.load(own + pixel * k * W + R + n, in_t, 0).to(real)[:, :, None]
                Ct = tl.load(own + pixel * k * W + R + N + n, in_t, 0).to(real)[:, :, None]
                a = tl.exp2(step * (rate * LOG2E)[None, None, :])
                gain = push * Bt
                _first, before, _last = _scan(a, gain, tl.load(kept + n, in_c, 0), segment, S, BD, False)
                if N > 1:
                    m = tl.load(carry + (row * d + c) * N + n, in_c & (tile > 0), 0)
                direct = Ct * g
                _first, after, m = _scan(a, a * direct, m, segment, S, BD, True)
                dh = direct + after
                past = a * before  # a[t] h[t-1]
                h = past + gain
                d_log = dh * past
                d_push += dh * Bt
                d_step += d_log * rate[None, None, :]
                tl.store(grad + pixel * k * W + R + n, tl.sum(dh * push, 2), in_t)
                tl.store(grad + pixel * k * W + R + N + n, tl.sum(h * g, 2), in_t)
                if N > 1:
                    tl.store(carry + (row * d + c) * N + n, m, in_c)
                    at = dA + ((row * S + segment) * d + c[None, :]) * N + n
                    total = tl.load(at, in_c[None, :] & (tile > 0), 0) + tl.sum(d_log * step, 1)
                    tl.store(at, total, in_c[None, :])
                else:
                    sum_A += tl.sum(d_log * step, 1)
            d_raw = tl.where(steps, (d_step + d_push * ut) * slope, 0)
            sum_D += tl.sum(g * ut, 1)
            sum_bias += tl.sum(d_raw, 1)
            lines = tl.reshape(d_raw, [S * STEPS, BD])
            d_factor = tl.dot(lines, tl.trans(weight.to(real)), input_precision=PRECISION)
            tl.store(grad + line[:, None] * k * W + rank[None, :], d_factor, in_f)
            sum_w += tl.dot(tl.trans(factor.to(real)), lines, input_precision=PRECISION)
            d_u = step * d_push + skip * g
            d_u += tl.load(dx + place, inside & ((turn > 0) | (not WHOLE)), 0)
            tl.store(dx + place, d_u, inside)
            if N > 1:
                tl.debug_barrier()  # the next tile reads what this one carries
        if N == 1:
            tl.store(dA + (row * S + segment) * d + c[None, :], sum_A, in_c[None, :])
        tl.store(dD + row * d + c, tl.sum(sum_D, 0), in_c)
        tl.store(dbias + row * d + c, tl.sum(sum_bias, 0), in_c)
        tl.store(ddt_proj + (row * d + c)[None, :] * R + rank[:, None], sum_w, in_w)
        tl.debug_barrier()  # the next route adds to dx


def forward(
    x: Tensor, projected: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor, bias: Tensor, routes: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """y (b, p, d) and the states before each chunk (b, k, chunks, d, n), both float32."""
    b, p, d = x.shape
    k, length = routes.shape
    n = A.shape[-1]
    tensors = [t.contiguous() for t in (x, projected, dt_proj, A, D, bias, routes)]
    states = x.new_empty(b, k, triton.cdiv(length, CHUNK), d, n, dtype=torch.float32)
    wide = n == 1 and b * triton.cdiv(d, WIDE["BD"]) >= PROGRAMS
    groups, grid, options = _launch(x, dt_proj, routes, n, WIDE if wide else LONG)
    y = _slices(x, groups, options["WHOLE"])
    with _on(x):
        _forward_kernel[grid](*tensors, y, states, p, k, length, d, k // groups, b, CHUNK=CHUNK, **options)
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
) -> tuple[Tensor, ...]:
    """Gradients of x, projected, dt_proj, A, D, bias, each in its tensor's dtype."""
    b, p, d = x.shape
    k, length = routes.shape
    n = A.shape[-1]
    given = [t.contiguous() for t in (x, projected, dt_proj, A, D, bias, routes)]
    groups, grid, options = _launch(x, dt_proj, routes, n, BACK)
    dx = _slices(x, groups, options["WHOLE"])
    new = states.new_empty if options["WHOLE"] else states.new_zeros
    dprojected = new(triton.cdiv(d, options["BD"]), *projected.shape)
    ddt_proj = states.new_empty(b, *dt_proj.shape)
    dA = states.new_empty(b, k, options["S"], d, n)
    dD, dbias = states.new_empty(b, k, d), states.new_empty(b, k, d)
    carry = states.new_empty(b, k, d, n)
    with _on(x):
        _backward_kernel[grid](
            dy.contiguous(), states, *given, dx, dprojected, ddt_proj, dA, dD, dbias, carry,
            p, k, length, d, k // groups, b, **options,
        )  # fmt: skip
    grads = _total(dx), _total(dprojected), ddt_proj.sum(0), dA.sum((0, 2)).view_as(A), dD.sum(0), dbias.sum(0)
    return tuple(g.to(t.dtype) for g, t in zip(grads, (x, projected, dt_proj, A, D, bias), strict=True))


def _launch(x: Tensor, dt_proj: Tensor, routes: Tensor, n: int, tile: dict) -> tuple[int, tuple[int, int], dict]:
    """Groups of routes, the grid, and the constants of a launch."""
    (b, p, d), (k, length), rank = x.shape, routes.shape, dt_proj.shape[-1]
    blocks = b * triton.cdiv(d, tile["BD"])
    groups = next(g for g in range(1, k + 1) if k % g == 0 and (blocks * g >= PROGRAMS or g == k))
    options = {
        "N": n,
        "R": rank,
        "RANKS": max(16, triton.next_power_of_2(rank)),
        "WHOLE": length == p,  # a route that visits no pixel twice then visits each
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
        **tile,
    }
    return groups, (blocks, groups), options


def _total(slices: Tensor) -> Tensor:
    return slices[0] if len(slices) == 1 else slices.sum(0)


def _slices(x: Tensor, groups: int, whole: bool) -> Tensor:
    """(groups, b, p, d), float32: zeros where the kernel may leave gaps."""
    return (x.new_empty if whole else x.new_zeros)(groups, *x.shape, dtype=torch.float32)

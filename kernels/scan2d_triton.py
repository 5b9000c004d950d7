"""Fused 2D selective scan in Triton, forward and backward; the equation and its letters are in ``scan2d_reference``.

A program scans BD channels of one sample along a route. Routes come one after the other, each added to the sum, so that
there are no atomics and nothing of size k * d * l in memory. Where that makes too few programs, routes run side by side
with slices of their own, which are summed in a fixed order. Few long routes are cut, too (``scan2d_ends_triton``); what
is called a segment below is a part of a tile. Tiles, segments and the recurrence in a tile are those of
``selective_scan_triton``. The forward projects delta inside the tile. The backward, whose gradients need products over
all pixels anyway, projects it in image order, a route at a time (several where they are small), which leaves it
registers to load a tile ahead.
A route must not visit a pixel twice, and must visit every pixel where it is as long as the map (``scan2d`` sees to it).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels import scan2d_ends_triton as ends
from vmamba.kernels import scan2d_segments as segments
from vmamba.kernels.backends import other_types
from vmamba.kernels.gpu import gpu_of
from vmamba.kernels.scan2d_ends_triton import entering, part_of_route
from vmamba.kernels.selective_scan_reference import CHUNK
from vmamba.kernels.selective_scan_triton import STEPS, _on, _scan, _step_size

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PROGRAMS = 256  # fewer than this do not fill a large GPU: routes then get programs of their own
# Tiles of S segments x STEPS x BD channels, measured on an H200; only one state fits in registers from tile to tile.
WIDE = {"S": 4, "BD": 32, "num_warps": 4, "maxnreg": 128}  # forward, one state, many programs
LONG = ends.TILE  # forward, else
BACK = {"S": 8, "BD": 16, "num_warps": 4, "maxnreg": 168}  # S * STEPS = CHUNK: a tile starts from a state that was kept
BYTES = 1 << 27  # of delta's projections at a time in the backward: those of one route, or of several small ones
LOG2E = tl.constexpr(1.4426950408889634)
RESIDENT, WORTH = 3, 6  # programs of a multiprocessor that segments make; fewer are not worth another launch
_INTEGERS = ["p", "k", "full", "d", "share", "route", "slot", "slots", "add", "per", "rows"]
_jit = triton.jit(do_not_specialize=_INTEGERS)


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors' types can be scanned; the device is the business of ``backends``."""
    return other_types(tensors, DTYPES)


@_jit
def _forward_kernel(
    x, projected, dt_proj, A, D, bias, routes, y, states, end_states, end_steps,
    p, k, full, d, share, per, rows,
    N: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, LOG_A: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    real = y.dtype.element_ty
    W: tl.constexpr = R + 2 * N
    blocks = tl.cdiv(d, BD)
    c = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    bi = (tl.program_id(0) // blocks).to(tl.int64)
    group, nth, first, length = part_of_route(tl.program_id(1), k, full, per, CUT)
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
        route = routes + ki * full + first
        own = projected + ki * W
        kept = states + ((bi * k + ki) * tl.cdiv(full, CHUNK) + first // CHUNK) * d * N + c * N
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
                rate = tl.load(A + (ki * d + c) * N + n, in_c, 0).to(real)
                if LOG_A:
                    rate = -tl.exp(rate)
                rate *= LOG2E
                Bt = tl.load(own + pixel * k * W + R + n, in_t, 0).to(real)[:, :, None]
                Ct = tl.load(own + pixel * k * W + R + N + n, in_t, 0).to(real)[:, :, None]
                a = tl.exp2(step * rate[None, None, :])
                gain = push * Bt
                if N > 1:
                    h = tl.load(kept + n, in_c & (start > 0), 0)
                if CUT and start == 0:
                    h = entering(end_states, end_steps, nth, bi * k + ki, rows * k, c, d, n, N, rate, in_c)
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


@triton.jit
def _fetch(x, raw, dy, dx, pixel, c, in_c, p, d, add):
    """A tile (S, T, BD) of x, of delta's projection, of dy, and of what dx holds already where ``add`` is 1."""
    inside = (pixel < p)[:, :, None] & in_c[None, None, :]
    place = pixel[:, :, None] * d + c[None, None, :]
    held = tl.load(dx + place, inside & (add > 0), 0)
    return tl.load(x + place, inside, 0), tl.load(raw + place, inside, 0), tl.load(dy + place, inside, 0), held


@_jit
def _backward_kernel(
    dy, states, x, raw, projected, A, D, bias, routes,
    dx, draw, dBC, dA, dD, dbias, carry, end_states, end_steps,
    p, k, full, d, route, slot, slots, add, per, rows,
    N: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    real = dy.dtype.element_ty
    W: tl.constexpr = R + 2 * N
    blocks = tl.cdiv(d, BD)
    block = tl.program_id(0) % blocks
    c = block * BD + tl.arange(0, BD)
    bi = (tl.program_id(0) // blocks).to(tl.int64)
    beside, nth, first, length = part_of_route(tl.program_id(1), k, full, per, CUT)  # of the routes of a launch
    ki = route + beside
    slot += beside
    part = (nth * rows + bi) * k + ki  # of sums over steps
    segment = tl.arange(0, S)[:, None]
    t = segment * STEPS + tl.arange(0, STEPS)[None, :]  # (S, T)
    in_c = c < d
    x += bi * p * d
    dy += bi * p * d
    raw += (bi * slots + slot) * p * d
    draw += (bi * slots + slot) * p * d
    dx += (beside * rows + bi) * p * d
    projected += bi * p * k * W + ki * W + R
    dBC += (block * rows + bi) * p * k * 2 * N + ki * 2 * N
    routes += ki * full + first
    carry += (part * d + c) * N
    dA += ((part * S + segment) * d + c[None, :]) * N  # (S, BD)
    skip = tl.load(D + ki * d + c, in_c, 0).to(real)[None, None, :]
    shift = tl.load(bias + ki * d + c, in_c, 0).to(real)[None, None, :]
    m = tl.zeros([BD], real)
    sum_A = tl.zeros([S, BD], real)
    sum_D = tl.zeros([S, BD], real)
    sum_bias = tl.zeros([S, BD], real)
    tiles = tl.cdiv(length, S * STEPS)
    states += (((bi * k + ki) * tl.cdiv(full, S * STEPS) + first // (S * STEPS) + tiles - 1) * d + c) * N
    last = (tiles - 1) * S * STEPS
    pixel = tl.load(routes + last + t, last + t < length, p)
    x1, raw1, g1, dx1 = _fetch(x, raw, dy, dx, pixel, c, in_c, p, d, add)
    ahead = tl.load(routes + last - S * STEPS + t, last - S * STEPS + t >= 0, p)
    for tile in range(0, tiles):
        start = (tiles - 1 - tile) * S * STEPS
        in_l = start + t < length
        steps = in_l[:, :, None] & in_c[None, None, :]
        in_t = in_l & (pixel < p)
        inside = in_t[:, :, None] & in_c[None, None, :]
        place = pixel[:, :, None] * d + c[None, None, :]
        here = pixel
        ut, g, delta, d_u = x1.to(real), g1, raw1.to(real) + shift, dx1
        pixel = ahead
        x1, raw1, g1, dx1 = _fetch(x, raw, dy, dx, pixel, c, in_c, p, d, add)
        later = start - 2 * S * STEPS + t
        ahead = tl.load(routes + later, later >= 0, p)
        step, slope = _step_size(delta, steps, True)
        push = step * ut
        d_push = tl.zeros([S, STEPS, BD], real)
        d_step = tl.zeros([S, STEPS, BD], real)
        for n in range(N):
            rate = tl.load(A + (ki * d + c) * N + n, in_c, 0).to(real)
            Bt = tl.load(projected + here * k * W + n, in_t, 0).to(real)[:, :, None]
            Ct = tl.load(projected + here * k * W + N + n, in_t, 0).to(real)[:, :, None]
            a = tl.exp2(step * (rate * LOG2E)[None, None, :])
            gain = push * Bt
            _first, before, _last = _scan(a, gain, tl.load(states + n, in_c, 0), segment, S, BD, False)
            if N > 1:
                m = tl.load(carry + n, in_c & (tile > 0), 0)
            if CUT and tile == 0:
                count = tl.cdiv(full, per) - 1
                end = (count - 1) * rows * k + bi * k + ki
                m = entering(end_states, end_steps, count - nth, end, -rows * k, c, d, n, N, rate * LOG2E, in_c)
            direct = Ct * g
            _first, after, m = _scan(a, a * direct, m, segment, S, BD, True)
            dh = direct + after
            past = a * before  # a[t] h[t-1]
            d_log = dh * past
            d_push += dh * Bt
            d_step += d_log * rate[None, None, :]
            tl.store(dBC + here * k * 2 * N + n, tl.sum(dh * push, 2), in_t)
            tl.store(dBC + here * k * 2 * N + N + n, tl.sum((past + gain) * g, 2), in_t)
            if N > 1:
                tl.store(carry + n, m, in_c)
                total = tl.load(dA + n, in_c[None, :] & (tile > 0), 0) + tl.sum(d_log * step, 1)
                tl.store(dA + n, total, in_c[None, :])
            else:
                sum_A += tl.sum(d_log * step, 1)
        d_delta = tl.where(steps, (d_step + d_push * ut) * slope, 0)
        sum_D += tl.sum(g * ut, 1)
        sum_bias += tl.sum(d_delta, 1)
        tl.store(draw + place, d_delta, inside)
        d_u += step * d_push + skip * g
        tl.store(dx + place, d_u, inside)
        if N > 1:
            tl.debug_barrier()  # the next tile reads what this one carries
        states -= d * N
    if N == 1:
        tl.store(dA, sum_A, in_c[None, :])
    tl.store(dD + part * d + c, tl.sum(sum_D, 0), in_c)
    tl.store(dbias + part * d + c, tl.sum(sum_bias, 0), in_c)


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
    cut = segments.cut(length, _cuts(grid[0] * k, length, x.device) if groups == k else 1)
    with _on(x):
        found = ends.find(True, *tensors[:4], *tensors[5:], cut) if cut.count > 1 else (y, y)
        sizes, grid = (p, k, length, d, k // groups, cut.per, b), (grid[0], groups * cut.count)
        flags = {"CHUNK": CHUNK, "LOG_A": False, "CUT": cut.count > 1}
        _forward_kernel[grid](*tensors, y, states, *found, *sizes, **flags, **options)
    return _total(y), states


def inline(
    x: Tensor, projected: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor, bias: Tensor, routes: Tensor, log_A: bool
) -> Tensor:
    """The forward's y in code that ``torch.compile`` traces, which launches the kernel as its own; A may be log(-A)."""
    b, p, d = x.shape
    (k, length), n = routes.shape, A.shape[-1]
    groups, grid, options = _launch(x, dt_proj, routes, n, {"S": LONG["S"], "BD": LONG["BD"]})
    tensors = [t.contiguous() for t in (x, projected, dt_proj, A, D, bias, routes)]
    states = x.new_empty(b, k, triton.cdiv(length, CHUNK), d, n, dtype=torch.float32)
    y = _slices(x, groups, options["WHOLE"])
    sizes, flags = (p, k, length, d, k // groups, length, b), {"CHUNK": CHUNK, "LOG_A": log_A, "CUT": False}
    _forward_kernel[grid](*tensors, y, states, y, y, *sizes, **flags, **options)
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
) -> tuple[Tensor, ...]:
    """Gradients of x, projected, dt_proj, A, D, bias, each in its tensor's dtype."""
    tensors = x, projected, dt_proj, A, D, bias
    b, p, d = x.shape
    (k, length), n, rank = routes.shape, A.shape[-1], dt_proj.shape[-1]
    dy, x, projected, A, D, bias, routes = (t.contiguous() for t in (dy, x, projected, A, D, bias, routes))
    blocks = b * triton.cdiv(d, BACK["BD"])
    abreast = 1 if blocks >= PROGRAMS else k  # routes per launch
    at_once = k if abreast == k else min(k, max(1, BYTES // (x.numel() * projected.element_size())))
    whole = length == p
    dx = _slices(x, abreast, whole)
    new = states.new_empty if whole else states.new_zeros
    dBC = new(triton.cdiv(d, BACK["BD"]), b, p, k, 2 * n)
    cut = segments.cut(length, _cuts(blocks * k, length, x.device) if abreast == k else 1)
    parts = b * cut.count
    dA, carry = states.new_empty(parts, k, BACK["S"], d, n), states.new_empty(parts, k, d, n)
    dD, dbias = states.new_empty(parts, k, d), states.new_empty(parts, k, d)
    dprojected, ddt_proj = torch.empty_like(projected), torch.empty_like(dt_proj)
    with _on(x):
        found = (
            ends.find(False, dy, projected, dt_proj.contiguous(), A, bias, routes, cut) if cut.count > 1 else (dx, dx)
        )
        for start in range(0, k, at_once):
            these = slice(start, min(start + at_once, k))
            factor = projected[:, :, these, :rank].transpose(1, 2)  # (b, routes, p, r)
            weight = dt_proj[these].to(projected.dtype)  # (routes, d, r)
            raw = (factor @ weight.mT).contiguous()  # (b, routes, p, d)
            draw = torch.empty_like(raw) if whole else torch.zeros_like(raw)
            for route in range(these.start, these.stop, abreast):
                _backward_kernel[(blocks, abreast * cut.count)](
                    dy, states, x, raw, projected, A, D, bias, routes, dx, draw, dBC, dA, dD, dbias, carry, *found,
                    p, k, length, d, route, route - start, raw.shape[1], int(route > 0 or not whole), cut.per, b,
                    n, rank, CUT=cut.count > 1, **BACK,
                )  # fmt: skip
            dprojected[:, :, these, :rank] = (draw @ weight).transpose(1, 2)
            ddt_proj[these] = (draw.mT @ factor).sum(0, dtype=torch.float32)
    dprojected[..., rank:] = _total(dBC)
    grads = _total(dx), dprojected, ddt_proj, dA.sum((0, 2)).view_as(A), dD.sum(0), dbias.sum(0)
    return tuple(g.to(t.dtype) for g, t in zip(grads, tensors, strict=True))


def _launch(x: Tensor, dt_proj: Tensor, routes: Tensor, n: int, tile: dict) -> tuple[int, tuple[int, int], dict]:
    """Groups of routes, the grid, and the constants of a launch."""
    (b, p, d), (k, length), rank = x.shape, routes.shape, dt_proj.shape[-1]
    blocks = b * triton.cdiv(d, tile["BD"])
    groups = next(g for g in range(1, k + 1) if k % g == 0 and (blocks * g >= PROGRAMS or g == k))
    options = {
        **ends.projection(x, n, rank),
        "WHOLE": length == p,  # a route that visits no pixel twice then visits each
        **tile,
    }
    return groups, (blocks, groups), options


def _cuts(programs: int, length: int, device: torch.device) -> int:
    """Segments of each route, where so many programs scan whole ones."""
    if device.type != "cuda":
        return 1
    count = segments.counts(programs, RESIDENT, gpu_of(device).processors, length)[-1]
    return count if count >= WORTH else 1


def _total(slices: Tensor) -> Tensor:
    return slices[0] if len(slices) == 1 else slices.sum(0)


def _slices(x: Tensor, groups: int, whole: bool) -> Tensor:
    """(groups, b, p, d), float32: zeros where the kernel may leave gaps."""
    return (x.new_empty if whole else x.new_zeros)(groups, *x.shape, dtype=torch.float32)

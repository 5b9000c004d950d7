"""Selective scan in Triton, forward and backward; the equation and its letters are in ``selective_scan_reference``.

A program scans BD channels of one route. It walks along tiles of S segments of 8 steps: a thread holds all steps of one
segment and channel, so that the scan inside a segment is a tree over its own registers; then the S segments are
chained. Steps are affine maps h -> p h + x; a step outside the route is the identity (p = 1, x = 0). The state between
tiles waits in device memory, one value for each channel and state, so any n works. The backward recomputes h from the
states that the forward kept before each chunk and runs the adjoint recurrence m[t] = a[t] (C[t] dy[t] + m[t+1]) from
the end. There are no atomics: sums over blocks of channels and over b are taken from partial sums, in a fixed order.

Own work; the recurrence is Mamba's (arXiv:2312.00752).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.kernels.backends import other_types
from vmamba.kernels.selective_scan_reference import CHUNK

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STEPS = tl.constexpr(8)
WIDTH = 8  # a row of 8 half-precision channels is 16 bytes; wider tiles chain segments across warps: slower on H200
# The fewer programs, the longer the tile (S * STEPS is a multiple of CHUNK): (most programs, S).
SEGMENTS = ((256, 32), (512, 16), (float("inf"), 8))
FORWARD_REGISTERS, BACKWARD_REGISTERS = 96, 128  # of a thread: more programs at a time outweigh some spilling
_INTEGERS = ["rows", "k", "length", "d", "Bb", "Bk", "Bl", "Bn", "Cb", "Ck", "Cl", "Cn"]
# Unknown alignment keeps loads one element wide, so that a thread holds steps of one channel, not several channels.
_POINTERS = ["u", "delta", "z", "dy", "y", "du", "ddelta", "dz"]
_jit = triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)


def why_not(*tensors: Tensor) -> str | None:
    """None where these tensors' types can be scanned; the device is the business of ``backends``."""
    return other_types(tensors, DTYPES)


@triton.jit
def _then_before(p, x, q, e, p2, x2, q2, e2):
    """The map (p2, x2) after (p, x); (q, e) is the same chain without its last map."""
    return p * p2, p2 * x + x2, p * q2, q2 * x + e2


@triton.jit
def _chain(p, x, h, segment, end: tl.constexpr, reverse: tl.constexpr):
    """Maps (p, x) of S segments (S, BD) applied one after the other to h (BD): states before each, state after all."""
    identity = tl.full(p.shape, 1, p.dtype), tl.zeros_like(x)
    p, x, q, e = tl.associative_scan((p, x, identity[0], identity[1]), 0, _then_before, reverse=reverse)
    after = tl.where(segment == end, p * h[None, :] + x, 0)
    return q * h[None, :] + e, tl.sum(after, 0)


@triton.jit
def _halves(x):
    """(..., 2, BD) -> two of (..., BD): a renaming of registers, like its inverse _join."""
    if len(x.shape) == 5:
        return tl.split(tl.permute(x, [0, 1, 2, 4, 3]))
    elif len(x.shape) == 4:
        return tl.split(tl.permute(x, [0, 1, 3, 2]))
    else:
        return tl.split(tl.permute(x, [0, 2, 1]))


@triton.jit
def _join(first, second):
    x = tl.join(first, second)
    if len(x.shape) == 5:
        return tl.permute(x, [0, 1, 2, 4, 3])
    elif len(x.shape) == 4:
        return tl.permute(x, [0, 1, 3, 2])
    else:
        return tl.permute(x, [0, 2, 1])


@triton.jit
def _up(p, x, reverse: tl.constexpr):
    """Neighbouring maps composed: the half that is applied first, and the composition."""
    p0, p1 = _halves(p)
    x0, x1 = _halves(x)
    if reverse:
        p0, p1, x0, x1 = p1, p0, x1, x0
    return p0, x0, p0 * p1, p1 * x0 + x1


@triton.jit
def _down(h, p, x, reverse: tl.constexpr):
    """States before each pair -> states before each of the two; (p, x) is applied first."""
    if reverse:
        return _join(p * h + x, h)
    else:
        return _join(h, p * h + x)


@triton.jit
def _scan(p, x, h, segment, S: tl.constexpr, BD: tl.constexpr, reverse: tl.constexpr):
    """Maps (p, x), (S, 8, BD), of S segments from state h (BD): states before segments, before steps, after all."""
    p3, x3, p, x = _up(tl.reshape(p, [S, 2, 2, 2, BD]), tl.reshape(x, [S, 2, 2, 2, BD]), reverse)
    p2, x2, p, x = _up(p, x, reverse)
    p1, x1, p, x = _up(p, x, reverse)
    p = tl.sum(tl.join(p, tl.zeros_like(p)), 2)  # p and x, unchanged: stops the compiler from doing all of the above
    x = tl.sum(tl.join(x, tl.zeros_like(x)), 2)  # again in _chain's layout (Triton 3.6)
    first, after = _chain(p, x, h, segment, 0 if reverse else S - 1, reverse)
    before = _down(_down(_down(first, p1, x1, reverse), p2, x2, reverse), p3, x3, reverse)
    return first, tl.reshape(before, [S, STEPS, BD]), after


@triton.jit
def _step_size(raw, inside, softplus: tl.constexpr):
    """softplus(raw), as raw above 20, and its derivative; a step of size 0 outside the route."""
    slope = tl.full(raw.shape, 1, raw.dtype)
    if softplus:
        small = tl.exp(-tl.abs(raw))
        one = 1 + small
        if raw.dtype == tl.float64:
            log1p = tl.where(one == 1, small, tl.log(one) * (small / tl.where(one == 1, 1, one - 1)))  # Kahan
        else:  # log(1 + s) / s on [0, 1] as a polynomial (Chebyshev fit): 2e-7 relative, also near 0
            log1p = small * 0.0051058256067335606 - 0.028991956263780594
            log1p = log1p * small + 0.07738073915243149
            log1p = log1p * small - 0.13590599596500397
            log1p = log1p * small + 0.1907130926847458
            log1p = log1p * small - 0.2483394593000412
            log1p = log1p * small + 0.3331793546676636
            log1p = log1p * small - 0.4999943673610687
            log1p = (log1p * small + 0.9999999403953552) * small
        slope = tl.where(raw > 20, 1, tl.where(raw > 0, 1, small) / one)
        raw = tl.where(raw > 20, raw, tl.maximum(raw, 0) + log1p)
    return tl.where(inside, raw, 0), slope


@_jit
def _forward_kernel(
    u, delta, A, B, C, D, z, bias, y, last, states,
    k, length, d, Bb, Bk, Bl, Bn, Cb, Ck, Cl, Cn,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    real = y.dtype.element_ty
    blocks = tl.cdiv(d, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    bi, ki = row // k, row % k
    c = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    segment = tl.arange(0, S)[:, None]
    t = segment * STEPS + tl.arange(0, STEPS)[None, :]  # (S, STEPS)
    place = t[:, :, None] * d + c[None, None, :]  # (S, STEPS, BD)
    B += bi * Bb + ki * Bk
    C += bi * Cb + ki * Ck
    A += (ki * d + c) * N
    last += (row * d + c) * N
    states += row * tl.cdiv(length, CHUNK) * d * N
    in_c = c < d
    for start in range(0, length, S * STEPS):
        at = tl.cast(start, tl.int64)
        in_t = start + t < length
        inside = in_t[:, :, None] & in_c[None, None, :]
        base = (row * length + at) * d
        ut = tl.load(u + base + place, inside, 0).to(real)
        raw = tl.load(delta + base + place, inside, 0).to(real)
        if bias is not None:
            raw += tl.load(bias + ki * d + c, in_c, 0).to(real)[None, None, :]
        step, _ = _step_size(raw, inside, SOFTPLUS)
        push = step * ut
        out = tl.zeros([S, STEPS, BD], real)
        if D is not None:
            out += ut * tl.load(D + ki * d + c, in_c, 0).to(real)[None, None, :]
        keep = in_c[None, :] & ((start + segment * STEPS) % CHUNK == 0) & (start + segment * STEPS < length)
        kept = states + ((at + segment * STEPS) // CHUNK * d + c[None, :]) * N
        for n in range(N):
            rate = tl.load(A + n, in_c, 0).to(real) * 1.4426950408889634
            Bt = tl.load(B + at * Bl + n * Bn + t * Bl, in_t, 0).to(real)[:, :, None]
            Ct = tl.load(C + at * Cl + n * Cn + t * Cl, in_t, 0).to(real)[:, :, None]
            a = tl.exp2(step * rate[None, None, :])
            x = push * Bt
            h = tl.load(last + n, in_c & (start > 0), 0)
            first, before, h = _scan(a, x, h, segment, S, BD, False)
            out += Ct * (a * before + x)
            tl.store(kept + n, first, keep)
            tl.store(last + n, h, in_c)
        if z is not None:
            zt = tl.load(z + base + place, inside, 0).to(real)
            out *= zt / (1 + tl.exp(-zt))
        tl.store(y + base + place, out, inside)
        tl.debug_barrier()  # the next tile reads `last`


@_jit
def _backward_kernel(
    dy, states, u, delta, A, B, C, D, z, bias, du, ddelta, dz, dA, dB, dC, dD, dbias, carry,
    rows, k, length, d, Bb, Bk, Bl, Bn, Cb, Ck, Cl, Cn,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    real = dy.dtype.element_ty
    blocks = tl.cdiv(d, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    bi, ki = row // k, row % k
    c = block * BD + tl.arange(0, BD)
    segment = tl.arange(0, S)[:, None]
    t = segment * STEPS + tl.arange(0, STEPS)[None, :]  # (S, STEPS)
    place = t[:, :, None] * d + c[None, None, :]  # (S, STEPS, BD)
    B += bi * Bb + ki * Bk
    C += bi * Cb + ki * Ck
    A += (ki * d + c) * N
    carry += (row * d + c) * N
    states += row * tl.cdiv(length, CHUNK) * d * N
    dA += ((row * S + segment) * d + c[None, :]) * N  # (S, BD)
    dB += (block * rows + row) * length * N
    dC += (block * rows + row) * length * N
    in_c = c < d
    sum_D = tl.zeros([S, BD], real)
    sum_bias = tl.zeros([S, BD], real)
    tiles = tl.cdiv(length, S * STEPS)
    for tile in range(0, tiles):
        start = (tiles - 1 - tile) * S * STEPS
        at = tl.cast(start, tl.int64)
        in_t = start + t < length
        inside = in_t[:, :, None] & in_c[None, None, :]
        base = (row * length + at) * d
        ut = tl.load(u + base + place, inside, 0).to(real)
        raw = tl.load(delta + base + place, inside, 0).to(real)
        if bias is not None:
            raw += tl.load(bias + ki * d + c, in_c, 0).to(real)[None, None, :]
        step, slope = _step_size(raw, inside, SOFTPLUS)
        push = step * ut
        g = tl.load(dy + base + place, inside, 0)  # gradient of y before the gate
        if z is not None:
            zt = tl.load(z + base + place, inside, 0).to(real)
            gate = 1 / (1 + tl.exp(-zt))
            g_gate = g * gate * (1 + zt * (1 - gate))
            g *= zt * gate
            out = tl.zeros([S, STEPS, BD], real)  # y before the gate
        d_push = tl.zeros([S, STEPS, BD], real)
        d_step = tl.zeros([S, STEPS, BD], real)
        for n in range(N):
            rate = tl.load(A + n, in_c, 0).to(real)
            Bt = tl.load(B + at * Bl + n * Bn + t * Bl, in_t, 0).to(real)[:, :, None]
            Ct = tl.load(C + at * Cl + n * Cn + t * Cl, in_t, 0).to(real)[:, :, None]
            a = tl.exp2(step * (rate * 1.4426950408889634)[None, None, :])
            x = push * Bt
            h = tl.load(states + (at // CHUNK * d + c) * N + n, in_c, 0)
            _, before, _ = _scan(a, x, h, segment, S, BD, False)
            decayed = a * before  # a[t] h[t-1]
            h = decayed + x
            direct = Ct * g
            m = tl.load(carry + n, in_c & (tile > 0), 0)
            _, after, m = _scan(a, a * direct, m, segment, S, BD, True)
            tl.store(carry + n, m, in_c)
            dh = direct + after
            d_log = dh * decayed
            d_push += dh * Bt
            d_step += d_log * rate[None, None, :]
            sum_A = tl.load(dA + n, in_c[None, :] & (tile > 0), 0) + tl.sum(d_log * step, 1)
            tl.store(dA + n, sum_A, in_c[None, :])
            tl.store(dB + at * N + n + t * N, tl.sum(dh * push, 2), in_t)
            tl.store(dC + at * N + n + t * N, tl.sum(h * g, 2), in_t)
            if z is not None:
                out += Ct * h
        d_u = step * d_push
        if D is not None:
            skip = tl.load(D + ki * d + c, in_c, 0).to(real)[None, None, :]
            d_u += skip * g
            sum_D += tl.sum(g * ut, 1)
            if z is not None:
                out += skip * ut
        d_raw = tl.where(inside, (d_step + d_push * ut) * slope, 0)
        tl.store(du + base + place, d_u, inside)
        tl.store(ddelta + base + place, d_raw, inside)
        if bias is not None:
            sum_bias += tl.sum(d_raw, 1)
        if z is not None:
            tl.store(dz + base + place, g_gate * out, inside)
        tl.debug_barrier()  # the next tile reads `carry`
    if D is not None:
        tl.store(dD + row * d + c, tl.sum(sum_D, 0), in_c)
    if bias is not None:
        tl.store(dbias + row * d + c, tl.sum(sum_bias, 0), in_c)


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
    """y (b, k, l, d), last state (b, k, d, n) and states before each chunk, in float32 (float64 for float64 inputs).

    Args: u, delta, z (b, k, l, d), A (k, d, n), B, C (b, k, l, n), D, bias (k, d); any strides.
    """
    b, k, length, d = u.shape
    n = A.shape[-1]
    real = torch.promote_types(u.dtype, torch.float32)
    y = u.new_empty(b, k, length, d, dtype=real)
    last = u.new_empty(b, k, d, n, dtype=real)
    states = u.new_empty(b, k, triton.cdiv(length, CHUNK), d, n, dtype=real)
    u, delta, A, D, z, bias = _contiguous(u, delta, A, D, z, bias)
    if y.numel():
        grid, tile = _tile(b * k, d)
        with _on(u):
            _forward_kernel[grid](
                u, delta, A, B, C, D, z, bias, y, last, states,
                k, length, d, *B.stride(), *C.stride(), n, softplus,
                **tile, maxnreg=FORWARD_REGISTERS,
            )  # fmt: skip
    return y, last, states


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
    b, k, length, d = u.shape
    n, rows = A.shape[-1], b * k
    dtypes = [None if t is None else t.dtype for t in (u, delta, A, B, C, D, z, bias)]
    u, delta, A, D, z, bias, dy = _contiguous(u, delta, A, D, z, bias, dy.to(states.dtype))
    grid, tile = _tile(rows, d)
    du, ddelta, dz = (None if t is None else torch.empty_like(dy, dtype=t.dtype) for t in (u, delta, z))
    dA = states.new_zeros(b, k, tile["S"], d, n)
    dB, dC = (states.new_empty(triton.cdiv(d, tile["BD"]), b, k, length, n) for _ in range(2))
    dD, dbias = (None if t is None else states.new_zeros(b, k, d) for t in (D, bias))
    if dy.numel():
        with _on(u):
            _backward_kernel[grid](
                dy, states, u, delta, A, B, C, D, z, bias, du, ddelta, dz, dA, dB, dC, dD, dbias,
                states.new_empty(rows, d, n), rows, k, length, d, *B.stride(), *C.stride(), n, softplus,
                **tile, maxnreg=BACKWARD_REGISTERS,
            )  # fmt: skip
    sums = [None if t is None else t.sum(axes) for t, axes in ((dD, 0), (dbias, 0))]
    grads = du, ddelta, dA.sum((0, 2)), dB.sum(0), dC.sum(0), sums[0], dz, sums[1]
    return tuple(None if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True))


def _tile(rows: int, d: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and a tile of S segments x STEPS x WIDTH channels, one segment of one channel for each thread."""
    programs = rows * triton.cdiv(d, WIDTH)
    segments = next(s for most, s in SEGMENTS if programs <= most)
    return (programs,), {"S": segments, "BD": WIDTH, "CHUNK": CHUNK, "num_warps": segments * WIDTH // 32}


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _on(t: Tensor) -> AbstractContextManager:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()

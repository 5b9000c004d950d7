"""Selective scan on the CPU: loops over blocks of channels that numba compiles to SIMD code, on all threads.

A task is a group of channel blocks of one route. Sequences go by in chunks of CHUNK steps whose intermediate numbers
stay in one small scratch array (cache); only the state before each chunk is kept. The backward pass walks the chunks in
reverse and recomputes their states. States are independent of each other, so n is the loop outside the steps.

Sums over channels (gradients of B and C) are added per group of blocks, then over groups, always in one order: results
are the same bits for any number of threads.
"""

import numpy as np
import torch
from torch import Tensor

from vmamba.kernels.backends import other_types
from vmamba.kernels.cpu import ONE, ZERO, exp, kernel, part, sigmoid, softplus, wide
from vmamba.kernels.selective_scan_reference import CHUNK
from vmamba.kernels.threads import share

WIDTH = 32  # channels per block: divides the widths of published models, and a chunk's scratch stays in the cache
GROUPS = 16  # about so many tasks in the backward pass: more would only make more partial sums
TILE = CHUNK * WIDTH
# Offsets in the scratch array, flat so that the compiler sees how far apart things are: tiles (step, channel) ...
DELTA, X, Y, U, GY, GX, GDELTA, SLOPE, DECAY, STATES = (TILE * i for i in range(10))
ROWS = STATES + TILE + WIDTH  # ... (STATES has a row more), then single rows (channel)
A_ROW, H_ROW, G_ROW, GA_ROW, D_ROW, BIAS_ROW, GD_ROW, GBIAS_ROW, SCRATCH = (ROWS + WIDTH * i for i in range(9))
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not(*tensors: Tensor) -> str | None:
    """None for CPU tensors of a floating-point type; half precision is computed in float32."""
    return other_types(tensors, TYPES)


@part
def _read(s, at, rows, x, begin, low, high):
    """Rows of x (l, d) from ``begin``, channels ``low`` to ``high`` -> the tile at ``at``."""
    for t in range(rows):
        source, target = x[begin + t, low:high], s[at + t * WIDTH : at + t * WIDTH + WIDTH]
        for j in range(high - low):
            target[j] = source[j]


@part
def _write(s, at, rows, x, begin, low, high):
    """The reverse of :func:`_read`."""
    for t in range(rows):
        source, target = s[at + t * WIDTH : at + t * WIDTH + WIDTH], x[begin + t, low:high]
        for j in range(high - low):
            target[j] = source[j]


@part
def _put(s, at, row):
    for j in range(row.size):
        s[at + j] = row[j]


@part
def _take(s, at, row):
    for j in range(row.size):
        row[j] = s[at + j]


@part
def _start(s, rows, softly):
    """Raw delta and u in their tiles -> delta with bias and softplus, x = delta u, y = D u."""
    wide()
    for t in range(rows):
        for j in range(WIDTH):
            i = t * WIDTH + j
            step = s[DELTA + i] + s[BIAS_ROW + j]
            step = softplus(step) if softly else step
            s[DELTA + i] = step
            s[X + i] = step * s[U + i]
            s[Y + i] = s[D_ROW + j] * s[U + i]


@part
def _scan(s, rows, B, b_at, b_step, C, c_at, c_step):
    """One state through a chunk: adds C h to y; H_ROW holds the state before and after."""
    wide()
    for t in range(rows):
        b, c = B[b_at + t * b_step], C[c_at + t * c_step]
        for j in range(WIDTH):
            i = t * WIDTH + j
            h = exp(s[DELTA + i] * s[A_ROW + j]) * s[H_ROW + j] + s[X + i] * b
            s[H_ROW + j] = h
            s[Y + i] += c * h


@kernel
def _forward(first, last, softly, u, delta, z, B, b_strides, C, c_strides, A, D, bias, y, final, states):
    wide()
    _, routes, length, channels = u.shape
    blocks = (channels + WIDTH - 1) // WIDTH
    s = np.zeros(SCRATCH, u.dtype)
    for task in range(first, last):
        b, k, low = task // blocks // routes, task // blocks % routes, task % blocks * WIDTH
        high = min(low + WIDTH, channels)
        _put(s, D_ROW, D[k, low:high])
        _put(s, BIAS_ROW, bias[k, low:high])
        b_task, c_task = b * b_strides[0] + k * b_strides[1], b * c_strides[0] + k * c_strides[1]
        h = final[b, k, low:high]
        h[:] = 0
        for begin in range(0, length, CHUNK):
            rows = min(CHUNK, length - begin)
            states[b, k, begin // CHUNK, low:high] = h
            _read(s, DELTA, rows, delta[b, k], begin, low, high)
            _read(s, U, rows, u[b, k], begin, low, high)
            _start(s, rows, softly)
            for n in range(A.shape[2]):
                _put(s, A_ROW, A[k, low:high, n])
                _put(s, H_ROW, h[:, n])
                b_at = b_task + begin * b_strides[2] + n * b_strides[3]
                c_at = c_task + begin * c_strides[2] + n * c_strides[3]
                _scan(s, rows, B, b_at, b_strides[2], C, c_at, c_strides[2])
                _take(s, H_ROW, h[:, n])
            if z.size:
                _read(s, GY, rows, z[b, k], begin, low, high)
                for i in range(rows * WIDTH):
                    s[Y + i] *= s[GY + i] * sigmoid(s[GY + i])
            _write(s, Y, rows, y[b, k], begin, low, high)


@part
def _scan_keeping(s, rows, B, b_at, b_step, C, c_at, c_step):
    """As :func:`_scan`, and keeps the decays and the states before each step and after the last."""
    wide()
    for t in range(rows):
        b, c = B[b_at + t * b_step], C[c_at + t * c_step]
        for j in range(WIDTH):
            i = t * WIDTH + j
            decay = exp(s[DELTA + i] * s[A_ROW + j])
            h = s[H_ROW + j]
            s[STATES + i] = h
            h = decay * h + s[X + i] * b
            s[DECAY + i] = decay
            s[H_ROW + j] = h
            s[Y + i] += c * h
    s[STATES + rows * WIDTH : STATES + rows * WIDTH + WIDTH] = s[H_ROW : H_ROW + WIDTH]


@part
def _scan_back(s, rows, B, b_at, b_step, C, c_at, c_step, gb, gc, begin, n):
    """One state back through a chunk: gradients of x and delta A to their tiles, of A to its row, of B, C to gb, gc.

    G_ROW holds decay times the gradient of the state, from the step after the chunk to the chunk's first.
    """
    wide()
    for back in range(1, rows + 1):
        t = (rows - back) & (CHUNK - 1)  # the mask changes nothing but tells the compiler that t >= 0
        b, c = B[b_at + t * b_step], C[c_at + t * c_step]
        sum_b = sum_c = ZERO
        for j in range(WIDTH):
            i = t * WIDTH + j
            g = s[G_ROW + j] + c * s[GY + i]
            sum_b += g * s[X + i]
            sum_c += s[GY + i] * s[STATES + WIDTH + i]
            s[GX + i] += g * b
            g *= s[DECAY + i]
            s[G_ROW + j] = g
            g *= s[STATES + i]
            s[GDELTA + i] += g * s[A_ROW + j]
            s[GA_ROW + j] += g * s[DELTA + i]
        gb[begin + t, n] += sum_b
        gc[begin + t, n] += sum_c


@part
def _start_back(s, rows, softly):
    """As :func:`_start`, from raw delta in SLOPE, which becomes the slope of delta; clears the sums over states."""
    wide()
    for i in range(rows * WIDTH):
        s[DELTA + i] = s[SLOPE + i]
        s[GX + i] = 0
        s[GDELTA + i] = 0
    _start(s, rows, softly)
    for t in range(rows):
        for j in range(WIDTH):
            i = t * WIDTH + j
            s[SLOPE + i] = sigmoid(s[SLOPE + i] + s[BIAS_ROW + j]) if softly else ONE


@part
def _ungate(s, rows, z, dy, dz, begin, low, high):
    """Gradient of z from y, in scratch, and the incoming gradient."""
    wide()
    for t in range(rows):
        z_row, dy_row, dz_row = z[begin + t, low:high], dy[begin + t, low:high], dz[begin + t, low:high]
        for j in range(high - low):
            gate = sigmoid(z_row[j])
            dz_row[j] = dy_row[j] * s[Y + t * WIDTH + j] * gate * (ONE + z_row[j] * (ONE - gate))


@part
def _finish_back(s, rows):
    """Sums over states -> gradients of u, in GX, and of raw delta, in GDELTA; adds to those of D and bias."""
    wide()
    for t in range(rows):
        for j in range(WIDTH):
            i = t * WIDTH + j
            g = s[SLOPE + i] * (s[GDELTA + i] + s[GX + i] * s[U + i])
            s[GDELTA + i] = g
            s[GBIAS_ROW + j] += g
            s[GX + i] = s[GX + i] * s[DELTA + i] + s[D_ROW + j] * s[GY + i]
            s[GD_ROW + j] += s[GY + i] * s[U + i]


@part
def _backward_block(s, carry, b, k, low, high, softly, arrays, dy, states, grads, gb, gc):
    u, delta, z, B, b_strides, C, c_strides, A, D, bias = arrays
    du, ddelta, dz, dA, dD, dbias = grads
    length, size = u.shape[2], high - low
    s[ROWS if size == WIDTH else 0 :] = 0
    carry[:] = 0
    _put(s, D_ROW, D[k, low:high])
    _put(s, BIAS_ROW, bias[k, low:high])
    for begin in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
        rows = min(CHUNK, length - begin)
        _read(s, SLOPE, rows, delta[b, k], begin, low, high)
        _read(s, U, rows, u[b, k], begin, low, high)
        _read(s, GY, rows, dy[b, k], begin, low, high)
        _start_back(s, rows, softly)
        if z.size:
            _read(s, DECAY, rows, z[b, k], begin, low, high)
            for i in range(rows * WIDTH):
                s[GY + i] *= s[DECAY + i] * sigmoid(s[DECAY + i])
        for n in range(A.shape[2]):
            _put(s, A_ROW, A[k, low:high, n])
            _put(s, H_ROW, states[b, k, begin // CHUNK, low:high, n])
            _put(s, G_ROW, carry[0, n])
            _put(s, GA_ROW, carry[1, n])
            b_at = b * b_strides[0] + k * b_strides[1] + begin * b_strides[2] + n * b_strides[3]
            c_at = b * c_strides[0] + k * c_strides[1] + begin * c_strides[2] + n * c_strides[3]
            _scan_keeping(s, rows, B, b_at, b_strides[2], C, c_at, c_strides[2])
            _scan_back(s, rows, B, b_at, b_strides[2], C, c_at, c_strides[2], gb, gc, begin, n)
            _take(s, G_ROW, carry[0, n])
            _take(s, GA_ROW, carry[1, n])
        if z.size:
            _ungate(s, rows, z[b, k], dy[b, k], dz[b, k], begin, low, high)
        _finish_back(s, rows)
        _write(s, GX, rows, du[b, k], begin, low, high)
        _write(s, GDELTA, rows, ddelta[b, k], begin, low, high)
    _take(s, GD_ROW, dD[b, k, low:high])
    _take(s, GBIAS_ROW, dbias[b, k, low:high])
    dA[b, k, low:high] = carry[1, :, :size].T


@kernel
def _backward(first, last, groups, softly, arrays, dy, states, grads, dB, dC):
    """A task is every ``groups``-th block of one route, whose sums over channels go to dB, dC (b, k, groups, l, n)."""
    routes, channels = arrays[0].shape[1], arrays[0].shape[3]
    s = np.zeros(SCRATCH, dy.dtype)
    carry = np.zeros((2, states.shape[4], WIDTH), dy.dtype)
    for task in range(first, last):
        b, k, group = task // groups // routes, task // groups % routes, task % groups
        for low in range(group * WIDTH, channels, groups * WIDTH):
            high = min(low + WIDTH, channels)
            sums = dB[b, k, group], dC[b, k, group]
            _backward_block(s, carry, b, k, low, high, softly, arrays, dy, states, grads, *sums)


def _prepare(dtype, u, delta, A, B, C, D, z, bias):
    """The kernels' arrays: contiguous rows, B and C as (storage, strides), zeros for what is absent."""
    rows = [_array(t, dtype) for t in (u, delta, u.new_empty(0, 0, 0, 0) if z is None else z)]
    maps = [part for t in (B, C) for part in _strided(t.detach().to(dtype))]
    zeros = A.new_zeros(A.shape[:2])
    return *rows, *maps, *(_array(zeros if t is None else t, dtype) for t in (A, D, bias))


def _array(t: Tensor, dtype: torch.dtype) -> np.ndarray:
    return t.detach().to(dtype).contiguous().numpy()


def _strided(t: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.as_strided((span,), (1,)).numpy(), t.stride()


def forward(u, delta, A, B, C, D, z, bias, softplus):
    """y (b, k, l, d), last state (b, k, d, n), states before each chunk (b, k, chunks, d, n), in float32 or float64."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    b, k, length, d = u.shape
    y = torch.empty(u.shape, dtype=dtype)
    last = torch.empty(b, *A.shape, dtype=dtype)
    states = torch.empty(b, k, -(-length // CHUNK), *A.shape[1:], dtype=dtype)
    arrays = _prepare(dtype, u, delta, A, B, C, D, z, bias)
    work = y.numel() * A.shape[2]
    share(_forward, b * k * -(-d // WIDTH), work, softplus, *arrays, y.numpy(), last.numpy(), states.numpy())
    return y, last, states


def backward(dy, states, softplus, u, delta, A, B, C, D, z, bias):
    """Gradients of u, delta, A, B, C, D, z, bias, each like its input; None where the input is None."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    b, k, length, d = u.shape
    n = A.shape[2]
    blocks = -(-d // WIDTH)
    groups = max(1, min(blocks, GROUPS // max(b * k, 1)))
    arrays = _prepare(dtype, u, delta, A, B, C, D, z, bias)
    shapes = [(0,) * 4 if t is None else t.shape for t in (u, delta, z)]
    maps = [torch.zeros(b, k, groups, length, n, dtype=dtype) for _ in "BC"]
    rows = [torch.empty(shape, dtype=dtype) for shape in shapes]
    sums = [torch.zeros(b, *shape, dtype=dtype) for shape in (A.shape, A.shape[:2], A.shape[:2])]
    work = 4 * u.numel() * n
    grads = tuple(t.numpy() for t in (*rows, *sums))
    incoming = _array(dy, dtype), _array(states, dtype)
    share(_backward, b * k * groups, work, groups, softplus, arrays, *incoming, grads, *(t.numpy() for t in maps))
    du, ddelta, dz = rows
    dA, dD, dbias = (t.sum(0) for t in sums)
    dB, dC = (t.sum(2) for t in maps)
    inputs = u, delta, A, B, C, D, z, bias
    pairs = zip(inputs, (du, ddelta, dA, dB, dC, dD, dz, dbias), strict=True)
    return tuple(None if t is None else g.to(t.dtype) for t, g in pairs)

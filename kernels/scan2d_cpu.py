"""Fused 2D selective scan on the CPU, forward and backward; the equation and its letters are in ``scan2d_reference``.

A task takes a block of channels of one sample along its routes, one after the other, and adds each to its own part of
y: nothing of size k * d * l is kept. A chunk's rows of x and of the projections are read through the route into a
scratch array, delta is projected there, and the recurrence is that of ``selective_scan_cpu``.
Where channels and samples make too few tasks, routes are shared out as well, each group with a y of its own.

Tasks and the order of all sums depend on the shapes alone: results are the same bits for any number of threads.
A route must not visit a pixel twice (``Table.once``).
"""

import numpy as np
import torch
from torch import Tensor

from vmamba.kernels.cpu import exp, kernel, part, softplus, wide
from vmamba.kernels.selective_scan_cpu import (
    A_ROW,
    BIAS_ROW,
    D_ROW,
    DECAY,
    DELTA,
    G_ROW,
    GA_ROW,
    GBIAS_ROW,
    GD_ROW,
    GDELTA,
    GX,
    GY,
    H_ROW,
    ROWS,
    SCRATCH,
    SLOPE,
    TILE,
    WIDTH,
    U,
    X,
    Y,
    _finish_back,
    _put,
    _scan,
    _scan_back,
    _scan_keeping,
    _start,
    _start_back,
    _take,
    why_not,
)
from vmamba.kernels.selective_scan_reference import CHUNK
from vmamba.kernels.threads import share

__all__ = ["backward", "forward", "why_not"]
TASKS = 4  # fewer blocks of channels and samples than this: routes become tasks too, which costs a sum over y
PARTS = 8  # about so many tasks in the backward pass: more would only make more partial sums
WEIGHTS = SCRATCH  # offset of dt_proj's rows (rank, channel); in the backward pass, then their gradients
# Masks that change nothing but tell the compiler that a number is not negative, and where the tiles end
TILES, FAR = 8 * TILE - 1, (1 << 40) - 1


@part
def _gather(s, at, route, x, low, high):
    """Rows ``route`` of x (p, d), channels ``low`` to ``high`` -> the tile at ``at``; zeros where route is p."""
    low &= FAR
    for t in range(route.size):
        row, pixel = (at & TILES) + (t & (CHUNK - 1)) * WIDTH, route[t] & FAR
        if pixel == x.shape[0]:
            for j in range(WIDTH):
                s[row + j] = 0
        elif high - low == WIDTH:
            for j in range(WIDTH):
                s[row + j] = x[pixel, low + j]
        else:
            for j in range(high - low):
                s[row + j] = x[pixel, low + j]


@part
def _scatter(s, at, route, x, low, high):
    """Adds the tile at ``at`` to the rows ``route`` of x: the transpose of :func:`_gather`."""
    low &= FAR
    for t in range(route.size):
        row, pixel = (at & TILES) + (t & (CHUNK - 1)) * WIDTH, route[t] & FAR
        if pixel == x.shape[0]:
            continue
        if high - low == WIDTH:
            for j in range(WIDTH):
                x[pixel, low + j] += s[row + j]
        else:
            for j in range(high - low):
                x[pixel, low + j] += s[row + j]


@part
def _gather_lines(lines, route, projected, k, rank):
    """Rows ``route`` of slot k of projected (p, k, rank + 2n) -> lines (CHUNK, ranks + 2n), rank padded by zeros."""
    n2 = projected.shape[2] - rank
    ranks = lines.shape[1] - n2
    for t in range(route.size):
        line = lines[t]
        if route[t] == projected.shape[0]:
            line[:] = 0
            continue
        source = projected[route[t], k]
        for i in range(rank):
            line[i] = source[i]
        for i in range(n2):
            line[ranks + i] = source[rank + i]


@part
def _scatter_lines(lines, route, projected, k, rank):
    """Adds lines to projected: the transpose of :func:`_gather_lines`."""
    n2 = projected.shape[2] - rank
    ranks = lines.shape[1] - n2
    for t in range(route.size):
        if route[t] == projected.shape[0]:
            continue
        target = projected[route[t], k]
        for i in range(rank):
            target[i] += lines[t, i]
        for i in range(n2):
            target[rank + i] += lines[t, ranks + i]


@part
def _project(s, at, rows, lines, ranks):
    """The tile at ``at`` = lines' factors times WEIGHTS: four ranks of four steps at a time."""
    wide()
    for i in range(at & TILES, (at & TILES) + (rows + 3) // 4 * 4 * WIDTH):
        s[i] = 0
    for quad in range((rows + 3) // 4):
        t = 4 * quad & (CHUNK - 1)
        i = (at & TILES) + t * WIDTH
        for first in range(0, ranks, 4):
            w = WEIGHTS + (first & FAR) * WIDTH
            f = first & FAR
            a0, a1, a2, a3 = lines[t, f], lines[t, f + 1], lines[t, f + 2], lines[t, f + 3]
            b0, b1, b2, b3 = lines[t + 1, f], lines[t + 1, f + 1], lines[t + 1, f + 2], lines[t + 1, f + 3]
            c0, c1, c2, c3 = lines[t + 2, f], lines[t + 2, f + 1], lines[t + 2, f + 2], lines[t + 2, f + 3]
            d0, d1, d2, d3 = lines[t + 3, f], lines[t + 3, f + 1], lines[t + 3, f + 2], lines[t + 3, f + 3]
            for j in range(WIDTH):
                w0, w1, w2, w3 = s[w + j], s[w + WIDTH + j], s[w + 2 * WIDTH + j], s[w + 3 * WIDTH + j]
                s[i + j] += a0 * w0 + a1 * w1 + a2 * w2 + a3 * w3
                s[i + WIDTH + j] += b0 * w0 + b1 * w1 + b2 * w2 + b3 * w3
                s[i + 2 * WIDTH + j] += c0 * w0 + c1 * w1 + c2 * w2 + c3 * w3
                s[i + 3 * WIDTH + j] += d0 * w0 + d1 * w1 + d2 * w2 + d3 * w3


@part
def _scan_one_state(s, route, flat, at, step, x, y, low):
    """A chunk with one state in one pass over the pixels, which saves the tiles: adds to y; WIDTH channels."""
    wide()
    low &= FAR
    for t in range(route.size):
        row, pixel = DELTA + (t & (CHUNK - 1)) * WIDTH, route[t] & FAR
        b, c = flat[at + t * step], flat[at + t * step + 1]
        if pixel == x.shape[0]:
            for j in range(WIDTH):
                s[H_ROW + j] *= exp(softplus(s[row + j] + s[BIAS_ROW + j]) * s[A_ROW + j])
            continue
        for j in range(WIDTH):
            u = x[pixel, low + j]
            delta = softplus(s[row + j] + s[BIAS_ROW + j])
            h = exp(delta * s[A_ROW + j]) * s[H_ROW + j] + delta * u * b
            s[H_ROW + j] = h
            y[pixel, low + j] += c * h + s[D_ROW + j] * u


@part
def _scan_states(s, route, flat, ranks, step, x, y, low, high, A, h):
    """A chunk with several states, one after the other: adds to y."""
    rows, n_states = route.size, A.shape[0]
    _gather(s, U, route, x, low, high)
    _start(s, rows, True)
    for n in range(n_states):
        _put(s, A_ROW, A[n, low:high])
        _put(s, H_ROW, h[n])
        _scan(s, rows, flat, ranks + n, step, flat, ranks + n_states + n, step)
        _take(s, H_ROW, h[n])
    _scatter(s, Y, route, y, low, high)


@part
def _scan_route(s, lines, h, b, k, low, high, x, projected, dt_proj, A, D, bias, routes, y, states):
    rank, n_states = dt_proj.shape[1], A.shape[1]
    ranks = lines.shape[1] - 2 * n_states
    _put(s, D_ROW, D[k, low:high])
    _put(s, BIAS_ROW, bias[k, low:high])
    for i in range(rank):
        _put(s, WEIGHTS + i * WIDTH, dt_proj[k, i, low:high])
    flat, step = lines.reshape(-1), lines.shape[1]
    h[:] = 0
    for begin in range(0, routes.shape[1], CHUNK):
        route = routes[k, begin : begin + CHUNK]
        for n in range(n_states):
            _take(h[n], 0, states[b, k, begin // CHUNK, low:high, n])
        _gather_lines(lines, route, projected[b], k, rank)
        _project(s, DELTA, route.size, lines, ranks)
        if n_states == 1 and high - low == WIDTH:
            _put(s, A_ROW, A[k, 0, low:high])
            _put(s, H_ROW, h[0])
            _scan_one_state(s, route, flat, ranks, step, x[b], y[b], low)
            _take(s, H_ROW, h[0])
        else:
            _scan_states(s, route, flat, ranks, step, x[b], y[b], low, high, A[k], h)


@kernel
def _forward(first, last, ranks, x, projected, dt_proj, A, D, bias, routes, y, states):
    """A task is a block of channels of one sample and one group of routes, which adds to y[group]."""
    batch, _, channels = x.shape
    blocks = (channels + WIDTH - 1) // WIDTH
    per_group = routes.shape[0] // y.shape[0]
    s = np.zeros(SCRATCH + ranks * WIDTH, x.dtype)
    lines = np.zeros((CHUNK, ranks + 2 * A.shape[1]), x.dtype)
    h = np.zeros((A.shape[1], WIDTH), x.dtype)
    for task in range(first, last):
        group, b, low = task // blocks // batch, task // blocks % batch, task % blocks * WIDTH
        high = min(low + WIDTH, channels)
        for k in range(group * per_group, (group + 1) * per_group):
            _scan_route(
                s, lines, h, b, k, low, high, x, projected, dt_proj, A, D, bias, routes, y[group], states
            )  # fmt: skip


@part
def _factors_back(s, rows, grads, ranks):
    """Gradient of raw delta, in GDELTA, times WEIGHTS transposed -> that of the factors, to grads; two ranks at a time.

    The tile is turned first, into DECAY: then loops over the steps are SIMD code.
    """
    wide()
    for t in range(CHUNK):
        for j in range(WIDTH):
            s[DECAY + j * CHUNK + t] = s[GDELTA + t * WIDTH + j]
    for i in range(0, ranks, 2):
        for t in range(2 * CHUNK):
            s[X + t] = 0
        for j in range(0, WIDTH, 4):
            w, row = WEIGHTS + (i & FAR) * WIDTH + j, DECAY + j * CHUNK
            a0, a1, a2, a3 = s[w], s[w + 1], s[w + 2], s[w + 3]
            w += WIDTH
            b0, b1, b2, b3 = s[w], s[w + 1], s[w + 2], s[w + 3]
            for t in range(CHUNK):
                g0, g1, g2, g3 = s[row + t], s[row + CHUNK + t], s[row + 2 * CHUNK + t], s[row + 3 * CHUNK + t]
                s[X + t] += a0 * g0 + a1 * g1 + a2 * g2 + a3 * g3
                s[X + CHUNK + t] += b0 * g0 + b1 * g1 + b2 * g2 + b3 * g3
        for t in range(rows):
            grads[t, i], grads[t, i + 1] = s[X + t], s[X + CHUNK + t]


@part
def _weights_back(s, rows, lines, ranks):
    """Adds lines' factors times GDELTA to the gradient of dt_proj, after WEIGHTS."""
    wide()
    for step in range(0, rows, 4):
        t = step & (CHUNK - 1)
        row = GDELTA + t * WIDTH
        for i in range(ranks):
            w = WEIGHTS + ((ranks + i) & FAR) * WIDTH
            a0, a1, a2, a3 = lines[t, i], lines[t + 1, i], lines[t + 2, i], lines[t + 3, i]
            for j in range(WIDTH):
                low = a0 * s[row + j] + a1 * s[row + WIDTH + j]
                high = a2 * s[row + 2 * WIDTH + j] + a3 * s[row + 3 * WIDTH + j]
                s[w + j] += low + high


@part
def _load_back(s, carry, k, low, high, dt_proj, D, bias):
    """The rows and the weights of a route; everything that sums along it is cleared."""
    size = high - low
    s[ROWS if size == WIDTH else 0 :] = 0
    _put(s, D_ROW, D[k, low:high])
    _put(s, BIAS_ROW, bias[k, low:high])
    carry[:] = 0
    for i in range(dt_proj.shape[1]):
        _put(s, WEIGHTS + i * WIDTH, dt_proj[k, i, low:high])


@part
def _scan_route_back(buffers, b, k, low, high, arrays, dy, states, dx, dprojected, sums):
    s, carry, lines, grads = buffers
    x, projected, dt_proj, A, D, bias, routes = arrays
    ddt_proj, dA, dD, dbias = sums
    size, rank, n_states = high - low, dt_proj.shape[1], A.shape[1]
    width = lines.shape[1]
    ranks = width - 2 * n_states
    flat = lines.reshape(-1)
    gb, gc = grads[:, ranks : ranks + n_states], grads[:, ranks + n_states :]
    gw = WEIGHTS + ranks * WIDTH
    _load_back(s, carry, k, low, high, dt_proj, D, bias)
    for begin in range((routes.shape[1] - 1) // CHUNK * CHUNK, -1, -CHUNK):
        route = routes[k, begin : begin + CHUNK]
        rows = route.size
        _gather_lines(lines, route, projected[b], k, rank)
        lines[rows:] = 0
        grads[:] = 0
        _gather(s, U, route, x[b], low, high)
        _gather(s, GY, route, dy[b], low, high)
        _project(s, SLOPE, rows, lines, ranks)
        _start_back(s, rows, True)
        for n in range(n_states):
            _put(s, A_ROW, A[k, n, low:high])
            _put(s, H_ROW, states[b, k, begin // CHUNK, low:high, n])
            _put(s, G_ROW, carry[0, n])
            _put(s, GA_ROW, carry[1, n])
            b_at, c_at = ranks + n, ranks + n_states + n
            _scan_keeping(s, rows, flat, b_at, width, flat, c_at, width)
            _scan_back(s, rows, flat, b_at, width, flat, c_at, width, gb, gc, 0, n)
            _take(s, G_ROW, carry[0, n])
            _take(s, GA_ROW, carry[1, n])
        _finish_back(s, rows)
        s[GDELTA + rows * WIDTH : GDELTA + TILE] = 0
        _factors_back(s, rows, grads, ranks)
        _weights_back(s, rows, lines, ranks)
        _scatter(s, GX, route, dx[b], low, high)
        _scatter_lines(grads, route, dprojected[b], k, rank)
    for i in range(rank):
        _take(s, gw + i * WIDTH, ddt_proj[b, k, i, low:high])
    dA[b, k, :, low:high] = carry[1, :, :size]
    _take(s, GD_ROW, dD[b, k, low:high])
    _take(s, GBIAS_ROW, dbias[b, k, low:high])


@kernel
def _backward(first, last, ranks, arrays, dy, states, dx, dprojected, sums):
    """A task is every ``parts``-th block of one sample and a group of routes: adds to dx[group], dprojected[part]."""
    batch, _, channels = arrays[0].shape
    n_states, parts = arrays[3].shape[1], dprojected.shape[0]
    per_group = arrays[6].shape[0] // dx.shape[0]
    s = np.zeros(SCRATCH + 2 * ranks * WIDTH, dy.dtype)
    carry = np.zeros((2, n_states, WIDTH), dy.dtype)
    lines = np.zeros((CHUNK, ranks + 2 * n_states), dy.dtype)
    buffers = s, carry, lines, np.zeros_like(lines)
    for task in range(first, last):
        group, b, part = task // parts // batch, task // parts % batch, task % parts
        for low in range(part * WIDTH, channels, parts * WIDTH):
            high = min(low + WIDTH, channels)
            for k in range(group * per_group, (group + 1) * per_group):
                _scan_route_back(buffers, b, k, low, high, arrays, dy, states, dx[group], dprojected[part], sums)


def _groups(tasks: int, k: int) -> int:
    """Into how many groups k routes are split beside ``tasks`` tasks: no more than there is need for."""
    return next(g for g in range(1, k + 1) if k % g == 0 and (tasks * g >= TASKS or g == k))


def _prepare(x, projected, dt_proj, A, D, bias, routes) -> tuple[np.ndarray, ...]:
    """The kernels' arrays, contiguous; dt_proj (k, r, d) and A (k, n, d)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    tensors = x, projected, dt_proj.mT, A.mT, D, bias
    return *(t.detach().to(dtype).contiguous().numpy() for t in tensors), routes.contiguous().numpy()


def _total(parts: Tensor) -> Tensor:
    """Sum over the first dimension, in its order."""
    total = parts[0]
    for following in parts[1:]:
        total = total + following
    return total


def forward(
    x: Tensor, projected: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor, bias: Tensor, routes: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """y (b, p, d) and the states before each chunk (b, k, chunks, d, n), in float32 or float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    (b, _, d), (k, length), n = x.shape, routes.shape, A.shape[2]
    tasks = b * -(-d // WIDTH)
    groups = _groups(tasks, k)
    y = torch.zeros(groups, *x.shape, dtype=dtype)
    states = torch.empty(b, k, -(-length // CHUNK), d, n, dtype=dtype)
    arrays = _prepare(x, projected, dt_proj, A, D, bias, routes)
    ranks = -(-dt_proj.shape[2] // 4) * 4
    share(_forward, tasks * groups, b * k * length * d * n, ranks, *arrays, y.numpy(), states.numpy())
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
    (b, _, d), (k, length), n = x.shape, routes.shape, A.shape[2]
    dtype = states.dtype
    parts = min(-(-d // WIDTH), -(-PARTS // max(b, 1)))
    groups = _groups(b * parts, k)
    dx = torch.zeros(groups, *x.shape, dtype=dtype)
    dprojected = torch.zeros(parts, *projected.shape, dtype=dtype)
    shapes = dt_proj.mT.shape, A.mT.shape, D.shape, bias.shape
    sums = [torch.zeros(max(b, 1), *shape, dtype=dtype) for shape in shapes]
    arrays = _prepare(x, projected, dt_proj, A, D, bias, routes)
    incoming = (t.detach().to(dtype).contiguous().numpy() for t in (dy, states))
    outgoing = dx.numpy(), dprojected.numpy(), tuple(t.numpy() for t in sums)
    ranks = -(-dt_proj.shape[2] // 4) * 4
    share(_backward, b * parts * groups, 4 * b * k * length * d * n, ranks, arrays, *incoming, *outgoing)
    ddt_proj, dA, dD, dbias = (_total(t) for t in sums)
    grads = _total(dx), _total(dprojected), ddt_proj.mT.contiguous(), dA.mT.contiguous(), dD, dbias
    return tuple(g.to(t.dtype) for g, t in zip(grads, (x, projected, dt_proj, A, D, bias), strict=True))

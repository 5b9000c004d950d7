"""What the CPU kernels share: exponentials that LLVM vectorises, and threads to share a kernel's tasks.

The float32 functions are branch-free polynomials without library calls, so that a loop over them becomes SIMD code;
relative errors are 9e-8 (``exp``) and 3e-7 (``softplus``), measured over the whole range by tests/test_cpu_kernels.py.
In float64 the same names are the C library's. They are compiled without reassociation, whatever the caller allows.

Numba's cache watches only the file of a kernel: after a change here, delete ``kernels/__pycache__/*.nb?``.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload

ZERO, ONE, TWO, TWENTY = (np.float32(v) for v in (0, 1, 2, 20))
LOG2_E, LN2_HIGH, LN2_LOW = (np.float32(v) for v in (math.log2(math.e), 0.693359375, math.log(2) - 0.693359375))
ROUND = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
EXPONENT, BIAS = np.int32(23), np.int32(127 << 23)
TINY, BELOW, ABOVE = (np.float32(v) for v in (-87.33, -88, 89))  # exp(TINY) is the last normal number
# (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2 and (log1p(e) / 2s - 1) / s**2, s = e / (2 + e), least maximal error
E2, E3, E4, E5, E6 = (
    np.float32(v) for v in (0.4999999341216, 0.1666652010372, 0.0416683942719, 0.00836878084394, 0.00138144649629)
)
L1, L2, L3, L4 = (np.float32(v) for v in (0.3333320656371, 0.200108496660, 0.139995684117, 0.140122397164))
PIECE = 50_000  # numbers to compute, below which sharing costs more than it brings

_inline: Any = {"fastmath": {"contract"}, "error_model": "numpy", "forceinline": True}
_loops: Any = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy", "nogil": True}
_internal: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_pools: list[ThreadPoolExecutor] = []
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_pools.clear)


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile ``function`` at its first call, for :func:`share`, and keep the code on disk where that is possible."""
    try:
        return njit(cache=True, **_loops)(function)
    except RuntimeError:  # numba found no such folder
        return njit(**_loops)(function)


def part(function: Callable[..., None]) -> Callable[..., None]:
    """Compile ``function`` as a part of kernels, which only they can call."""
    return njit(**_loops, **_internal)(function)


@njit(**_inline)
def _exp32(x):
    x = BELOW if x < TINY else x
    x = ABOVE if x > ABOVE else x
    shifted = x * LOG2_E + ROUND
    whole = shifted - ROUND
    r = x - whole * LN2_HIGH - whole * LN2_LOW
    power = ((((E6 * r + E5) * r + E4) * r + E3) * r + E2) * r * r + r + ONE
    scale = np.int32((np.float32(shifted).view(np.int32) << EXPONENT) + BIAS)
    return power * scale.view(np.float32)


@njit(**_inline)
def _softplus32(x):
    e = _exp32(-abs(x))
    s = e / (TWO + e)
    q = s * s
    positive = x if x > ZERO else ZERO
    return positive + TWO * s * ((((L4 * q + L3) * q + L2) * q + L1) * q + ONE)


@njit(**_inline)
def _softplus64(x):
    return x if x > TWENTY else math.log1p(math.exp(x))


def exp(x: float) -> float:
    """exp(x) inside a compiled kernel, in x's type; 0 below -87.33 in float32, where results would be denormal."""
    raise NotImplementedError("call exp from a function compiled by numba")


def softplus(x: float) -> float:
    """log(1 + exp(x)) inside a compiled kernel, in x's type; x itself above 20, as in PyTorch."""
    raise NotImplementedError("call softplus from a function compiled by numba")


@overload(exp, jit_options=_inline)
def _(x):
    return (lambda x: _exp32(x)) if x == types.float32 else (lambda x: math.exp(x))


@overload(softplus, jit_options=_inline)
def _(x):
    return (lambda x: _softplus32(x)) if x == types.float32 else (lambda x: _softplus64(x))


@njit(**_inline)
def sigmoid(x):
    """1 / (1 + exp(-x)) in x's type."""
    e = exp(-abs(x))
    return (ONE if x > ZERO else e) / (ONE + e)


def share(kernel: Callable[..., None], tasks: int, work: int, *arguments: Any) -> None:
    """Run ``kernel(first, last, *arguments)`` over all ``tasks``, on up to ``torch.get_num_threads()`` threads.

    The kernel releases the GIL and its tasks write apart from each other, so results do not depend on the spreading.
    ``work`` is about how many numbers the tasks compute: a small job stays on the calling thread. Threads take pieces
    as they come free, so a helper that gets no core delays nothing but the piece that it holds.
    """
    threads = torch.get_num_threads()
    count = min(tasks, 4 * threads, max(work // PIECE, 1)) if threads > 1 else min(tasks, 1)
    pieces = [(tasks * i // count, tasks * (i + 1) // count) for i in range(count)]

    def take() -> None:
        while pieces:
            try:
                piece = pieces.pop()
            except IndexError:  # another thread was faster
                return
            kernel(*piece, *arguments)

    helpers = [_pool().submit(take) for _ in range(min(threads, count) - 1)]
    take()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


def _pool() -> ThreadPoolExecutor:
    if not _pools:
        _pools.append(ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="vmamba"))
    return _pools[0]

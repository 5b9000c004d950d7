"""What the CPU kernels share: exponentials that LLVM vectorises, and how kernels are compiled.

The float32 functions are branch-free polynomials without library calls, so that a loop over them becomes SIMD code;
relative errors are 9e-8 (``exp``) and 3e-7 (``softplus``), measured over the whole range by tests/test_cpu_kernels.py.
In float64 the same names are the C library's. They are compiled without reassociation, whatever the caller allows.

Numba's cache watches only the file of a kernel: after a change here, delete ``kernels/__pycache__/*.nb?``.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
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

_inline: Any = {"fastmath": {"contract"}, "error_model": "numpy", "forceinline": True}
_loops: Any = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy", "nogil": True}
_internal: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile ``function`` at its first call, for ``threads.share``; the code is kept on disk where possible."""
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

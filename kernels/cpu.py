"""What the CPU kernels share: exponentials that LLVM vectorises, and how kernels are compiled.

The float32 functions are branch-free polynomials without library calls, so that a loop over them becomes SIMD code;
relative errors are 9e-8 (``exp``) and 1.7e-7 (``softplus``), measured over the whole range by a test.
In float64 the same names are the C library's. They are compiled without reassociation, whatever the caller allows.

Numba's cache watches only the file of a kernel: after a change here, delete ``kernels/__pycache__/*.nb?``.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

ZERO, ONE, TWENTY = (np.float32(v) for v in (0, 1, 20))
LOG2_E, LN2_HIGH, LN2_LOW = (np.float32(v) for v in (math.log2(math.e), 0.693359375, math.log(2) - 0.693359375))
ROUND = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
EXPONENT, BIAS = np.int32(23), np.int32(127 << 23)
BELOW, ABOVE = np.float32(-88), np.float32(89)  # where exp is 0, and where it is infinite
# (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2 and (log1p(e) - e) / e**2 on 0 <= e <= 1, least maximal relative error
E2, E3, E4, E5, E6 = (
    np.float32(v) for v in (0.4999999341216, 0.1666652010372, 0.0416683942719, 0.00836878084394, 0.00138144649629)
)
L2, L3, L4, L5 = (np.float32(v) for v in (-0.499996479625, 0.333213225942, -0.248571634699, 0.191536541517))
L6, L7, L8, L9 = (np.float32(v) for v in (-0.137538006481, 0.0792045154928, -0.0300657799175, 0.00536482123433))

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


@intrinsic
def _wide(_):
    def generate(context, builder, _signature, _arguments):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's ``add`` does not know it
        return context.get_dummy_value()

    return types.void(), generate


wide: Any = _wide  # a call of it lets LLVM use all of AVX-512's width in the calling function, by itself it uses half


@njit(**_inline)
def _exp32(x):
    x = BELOW if x < BELOW else x  # written so that they become one instruction each, and NaN stays
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
    positive = x if x > ZERO else ZERO
    series = ((((((L9 * e + L8) * e + L7) * e + L6) * e + L5) * e + L4) * e + L3) * e + L2
    return positive + (series * e + ONE) * e


@njit(**_inline)
def _softplus64(x):
    return x if x > TWENTY else math.log1p(math.exp(x))


def exp(x: float) -> float:
    """exp(x) inside a compiled kernel, in x's type; 0 below -87.7 in float32."""
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

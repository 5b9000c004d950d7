"""The CPU scan against the float64 reference, its fast exponentials against NumPy, and its threads."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numba import njit

from vmamba.kernels import cpu, threads
from vmamba.kernels import selective_scan_cpu as fast
from vmamba.kernels import selective_scan_reference as exact
from vmamba.kernels.backends import why_not
from vmamba.kernels.threads import share

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NAMES = ["y", "last", "states", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias"]
_exp, _softplus, _sigmoid = (getattr(cpu, name) for name in ("exp", "softplus", "sigmoid"))


@njit
def functions(x, out):
    for i in range(x.size):
        out[0, i] = _exp(x[i])
        out[1, i] = _softplus(x[i])
        out[2, i] = _sigmoid(x[i])


def computed(x, dtype):
    x = np.asarray(x, dtype)
    out = np.empty((3, x.size), dtype)
    functions(x, out)
    return x.astype(np.float64), out.astype(np.float64)


def scan_case(b, k, length, d, n, *, dtype=torch.float32, gate=True, decay=1.0, step=-2.0):
    """Tensors of a scan as models have them: small steps, A = -(1 .. n) jittered; ``decay`` scales A."""
    generator = torch.Generator().manual_seed(length * 1000 + d * 10 + n)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A = -decay * torch.arange(1, n + 1) * torch.exp(0.1 * normal(k, d, n))
    optional = (normal(k, d), normal(b, k, length, d) if gate else None, 0.5 * normal(k, d))
    u, delta = normal(b, k, length, d), 0.5 * normal(b, k, length, d) + step
    tensors = u, delta, A, normal(b, k, length, n), normal(b, k, length, n), *optional
    return [None if t is None else t.to(dtype) for t in tensors]


def both(module, tensors, softplus=True):
    """All results of a scan, forward and backward, under a fixed upstream gradient."""
    y, last, states = module.forward(*tensors, softplus)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, last, states, *module.backward(dy, states, softplus, *tensors)]


def check(tensors, tolerance, softplus=True):
    expected = both(exact, [None if t is None else t.double() for t in tensors], softplus)
    for name, got, want in zip(NAMES, both(fast, tensors, softplus), expected, strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            assert got.shape == want.shape, name
            assert float((got - want).abs().max()) <= tolerance * max(float(want.abs().max()), 1e-3), name


def test_functions_are_exact():
    x, (exp, softplus, sigmoid) = computed(np.linspace(-87.3, 88.3, 1_000_001), np.float32)
    assert np.abs(exp / np.exp(x) - 1).max() < 1e-7
    assert np.abs(softplus / np.logaddexp(0, x) - 1).max() < 2e-7
    assert np.abs(sigmoid * (1 + np.exp(-x)) - 1).max() < 3e-7
    x, (exp, softplus, sigmoid) = computed(np.linspace(-87.3, 19, 10_001), np.float64)
    assert np.abs(exp / np.exp(x) - 1).max() < 1e-15
    assert np.abs(softplus / np.logaddexp(0, x) - 1).max() < 1e-15
    assert np.abs(sigmoid * (1 + np.exp(-x)) - 1).max() < 1e-15


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_functions_at_the_ends(dtype):
    _, (exp, softplus, sigmoid) = computed([-np.inf, -1e4, -1e3, 0, 1e3, np.inf, np.nan], dtype)
    assert np.array_equal(exp, [0, 0, 0, 1, np.inf, np.inf, np.nan], equal_nan=True)
    assert np.allclose(softplus, [0, 0, 0, np.log(2), 1e3, np.inf, np.nan], rtol=1e-7, equal_nan=True)
    assert np.array_equal(sigmoid, [0, 0, 0, 0.5, 1, 1, np.nan], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length, d", [(1, 33), (7, 96), (63, 5), (64, 1), (65, 33), (200, 5)])
@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_against_the_reference(n, length, d, dtype):
    if n == 64 and length == 200:
        d = 1
    check(scan_case(2, 2, length, d, n, dtype=dtype, gate=n != 4), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    tensors = scan_case(1, 2, 70, 20, 3, dtype=dtype)
    check(tensors, TOLERANCE[dtype])
    y, last, states, *grads = both(fast, tensors)
    assert {t.dtype for t in (y, last, states)} == {torch.float32} and {g.dtype for g in grads} == {dtype}


@pytest.mark.parametrize("dropped", [(), (5,), (6,), (7,), (5, 6, 7)])
def test_absent_tensors(dropped):
    tensors = scan_case(2, 3, 66, 7, 2, dtype=torch.float64)
    tensors[1] = tensors[1].abs()
    check([None if i in dropped else t for i, t in enumerate(tensors)], 1e-12, softplus=False)


def test_views_of_any_strides():
    u, delta, A, B, C, D, z, bias = scan_case(2, 3, 70, 40, 4, dtype=torch.float64)
    u = u.transpose(2, 3).contiguous().transpose(2, 3)
    delta = delta.flip(3).expand(2, 3, 70, 40)[:, :1].expand(-1, 3, -1, -1)
    B = B[:, :, :1].expand(-1, -1, 70, -1)
    C = C.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)[:, :1].expand(-1, 3, -1, -1)
    wide = torch.cat([z, z], 3)[..., ::2]
    check([u, delta, A.mT.contiguous().mT, B, C, D[:1].expand(3, -1), wide, bias], 1e-12)


def test_strong_decay_and_large_steps():
    tensors = scan_case(1, 2, 130, 33, 4, decay=250.0, step=0.0)
    tensors[1] = tensors[1] * 25
    assert float(tensors[1].max() * tensors[2].min()) < -1e4
    check(tensors, 3e-6)


def test_long_sequences_stay_accurate():
    tensors = scan_case(1, 1, 20_000, 8, 2, step=-6.0)
    wide = both(fast, [t.double() for t in tensors])
    for name, got, want in zip(NAMES, both(fast, tensors), wide, strict=True):
        assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max()), name


def test_a_nan_is_not_hidden():
    tensors = scan_case(1, 1, 10, 4, 2, gate=False)
    tensors[1][0, 0, 3, 1] = float("nan")
    y = fast.forward(*tensors, True)[0][0, 0]
    assert y[3:, 1].isnan().all() and not y[:3].isnan().any() and not y[:, [0, 2, 3]].isnan().any()


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(threads, "PIECE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_same_bits_on_any_number_of_threads(two_threads):
    tensors = scan_case(2, 2, 130, 200, 3)
    shared = both(fast, tensors)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert equal(both(fast, tensors), shared)


def test_several_python_threads_at_once(two_threads):
    cases = [scan_case(1, 2, 130, 100, n) for n in range(1, 5)]
    expected = [both(fast, case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: both(fast, cases[i % 4]), range(40)))
    assert all(equal(result, expected[i % 4]) for i, result in enumerate(results))


def test_after_a_fork(two_threads):
    tensors = scan_case(1, 2, 66, 70, 2)
    expected = both(fast, tensors)
    child = multiprocessing.get_context("fork").Process(target=_compare_or_fail, args=(tensors, expected))
    child.start()
    child.join(60)
    finished = child.exitcode
    child.kill()
    assert finished == 0


def _compare_or_fail(tensors, expected):
    assert equal(both(fast, tensors), expected)


def test_an_error_in_a_helper_reaches_the_caller(two_threads):
    def kernel(first, last):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        share(kernel, 8, 1_000_000)


def test_every_task_runs_once(two_threads):
    for tasks in (0, 1, 2, 7, 100):
        done = []
        share(lambda first, last, done=done: done.extend(range(first, last)), tasks, 1_000_000)
        assert sorted(done) == list(range(tasks))


def test_the_reason_for_other_types():
    reason = why_not("selective_scan", "cpu", torch.zeros(1, dtype=torch.complex64))
    assert reason is not None and "got torch.complex64" in reason


def test_a_kernel_compiles_where_nothing_can_be_cached(monkeypatch):
    def refuse(cache=False, **options):
        if cache:
            raise RuntimeError("no locator available")
        return njit(**options)

    def count(first, last, out):
        for i in range(first, last):
            out[i] += 1

    monkeypatch.setattr(cpu, "njit", refuse)
    out = np.zeros(3)
    share(cpu.kernel(count), 3, 1, out)
    assert out.tolist() == [1, 1, 1]

"""Triton kernels that the compiler launches like its own, where it compiles inference: in Triton's interpreter here.

The interpreter needs a process of its own; the last test runs this file there.
"""

import os
import subprocess
import sys

import pytest
import torch

from vmamba.kernels import backends, depthwise_silu_reference, scan2d_reference
from vmamba.kernels.scan2d import scan2d
from vmamba.scans import Scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def scanned(d=10, n=2, r=3, side=3, scan="cross"):
    torch.manual_seed(0)
    table = Scan(scan).table(side, side)
    k, p = len(table.routes), side * side
    maps = torch.randn(2, p, d), torch.randn(2, p, k, r + 2 * n)
    return (*maps, torch.randn(k, d, r), torch.randn(k, d, n), torch.randn(k, d), torch.randn(k, d) - 2), table


if INTERPRETED:
    from tests import interpreter  # noqa: F401

    @pytest.mark.parametrize("log_A", [True, False])
    @pytest.mark.parametrize("scan", ["cross", "atrous"])
    def test_scan2d(scan, log_A):
        from vmamba.kernels import scan2d_triton

        (x, projected, dt_proj, logs, D, bias), table = scanned(scan=scan)
        A = -logs.exp()
        y = scan2d_triton.inline(x, projected, dt_proj, logs if log_A else A, D, bias, table.routes, log_A)
        expected = scan2d_reference.forward(x, projected, dt_proj, A, D, bias, *table[:2])[0]
        assert torch.allclose(y, expected, atol=1e-5)

    @pytest.mark.parametrize("k, biased", [(3, True), (5, False)])
    def test_depthwise_silu(k, biased):
        from vmamba.kernels import depthwise_silu_inline_triton

        x, weight, bias = torch.randn(2, 4, 5, 70), torch.randn(70, 1, k, k), torch.randn(70) if biased else None
        y = depthwise_silu_inline_triton.forward(x, weight, bias)
        assert torch.allclose(y, depthwise_silu_reference.forward(x, weight, bias), atol=1e-5)


def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "scan2d or silu"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "6 passed" in run.stdout


@pytest.mark.parametrize("scan", ["cross", "atrous"])
def test_logarithms_of_the_decays(scan):
    (x, projected, dt_proj, logs, *rest), table = scanned(scan=scan)
    expected = scan2d(x, projected, dt_proj, -logs.exp(), *rest, table)
    assert torch.equal(scan2d(x, projected, dt_proj, logs, *rest, table, log_A=True), expected)


def test_only_for_the_compiler_and_without_gradients(monkeypatch):
    class Map:
        is_cuda, dtype, size = True, torch.bfloat16, 100

        def numel(self):
            return self.size

    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    monkeypatch.setattr(backends, "TRITON", True)
    with torch.no_grad():
        assert backends.inlines(Map())
        with backends.use_backend("reference"):
            assert not backends.inlines(Map())
        monkeypatch.setattr(Map, "size", backends.INLINED + 1)
        assert not backends.inlines(Map())
        monkeypatch.setattr(Map, "size", 100)
        monkeypatch.setattr(Map, "dtype", torch.float64)
        assert not backends.inlines(Map())
        monkeypatch.setattr(Map, "dtype", torch.float16)
        assert backends.inlines(Map())
        monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: False)
        assert not backends.inlines(Map())
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert not backends.inlines(Map())

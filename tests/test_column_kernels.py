"""Kernels of columns of blocks (Vim): the convolution along routes, their gated sum, the residual stream and its norm.

Triton runs in its interpreter here, in a process of its own; on a GPU, and with CUDA C++, by ``make test-gpu``.
"""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import vmamba
from vmamba.add_norm import add_then_norm
from vmamba.kernels import (
    add_norm_cuda,
    add_norm_reference,
    gated_merge_cuda,
    gated_merge_reference,
    nvrtc,
    route_conv_cuda,
    route_conv_reference,
    route_weights_cuda,
    route_weights_reference,
    stored,
)
from vmamba.kernels.add_norm import Norm, add_norm
from vmamba.kernels.gated_merge import gated_merge
from vmamba.kernels.route_conv import route_conv
from vmamba.kernels.route_weights import Projections, route_weights
from vmamba.mixers.bimamba import BiMamba
from vmamba.scans import Scan
from vmamba.tokens import PatchConv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}  # of an operator, relative norm
GRIDS = [("bidirectional", (5, 7), 33), ("atrous", (5, 7), 24), ("cross", (1, 1), 5), ("chained", (3, 4), 130)]
SHAPES = [(2, 5, 96), (1, 7), (3, 2, 33), (2, 3000)]


def make(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape).to(device, dtype)


def far(got, right):
    return float((got.cpu().double() - right).norm() / right.norm())


def half_of(x):
    """The same numbers as every other row's second half: strides of a view."""
    return torch.cat([torch.zeros_like(x), x], -1)[..., x.shape[-1] :]


def conv_error(scan, grid, d, dtype, width, device="cpu"):
    torch.manual_seed(d)
    table, pixels = Scan(scan).table(*grid), grid[0] * grid[1]
    k = len(table.routes)
    x, weight, bias = make(2, pixels, d, dtype=dtype), make(k, d, width), make(k, d)
    with vmamba.use_backend("reference"):  # of what it calls, which is on the CPU
        right = route_conv_reference.forward(x.double(), weight.double(), bias.double(), table)
    table = Scan(scan).table(*grid, device)
    got = route_conv(half_of(x.to(device)), weight.to(device), bias.to(device), table)
    assert got.dtype == dtype and got.is_contiguous()
    return far(got, right)


def merge_error(scan, grid, d, dtype, device="cpu"):
    torch.manual_seed(d)
    table = Scan(scan).table(*grid)
    y, z = make(2, *table.routes.shape, d, dtype=dtype), make(2, grid[0] * grid[1], d, dtype=dtype)
    with vmamba.use_backend("reference"):
        right = gated_merge_reference.forward(y.double(), z.double(), table, 3, torch.float64)
    table = Scan(scan).table(*grid, device)
    got = gated_merge(y.to(device), half_of(z.to(device)), table, divisor=3, dtype=dtype)
    assert got.dtype == dtype
    return far(got, right)


def norm_errors(shape, dtype, centred, biased, first, device="cpu"):
    torch.manual_seed(shape[-1])
    h, r, weight, bias = make(*shape, dtype=dtype), make(*shape), make(shape[-1]), make(shape[-1])

    def run(function, to, result):
        norm = Norm(to(weight), to(bias) if biased else None, 1e-5, centred)
        return function(to(h), None if first else to(r), norm, result)

    right = run(add_norm_reference.forward, Tensor.double, torch.float64)
    got = run(add_norm, lambda t: t.to(device), dtype)
    assert [t.dtype for t in got] == [dtype, torch.float32]
    return [far(g, t) for g, t in zip(got, right, strict=True)]


if INTERPRETED:
    from tests import interpreter  # noqa: F401

    @pytest.mark.parametrize("scan, grid, d", GRIDS)
    def test_kernels_of_routes(scan, grid, d):
        assert conv_error(scan, grid, d, torch.float32, 4) < 1e-6
        assert merge_error(scan, grid, d, torch.float32) < 1e-6

    @pytest.mark.parametrize("shape", SHAPES)
    def test_kernels_of_norms(shape):
        for flags in ((False, False, False), (True, True, False), (False, False, True)):
            assert max(norm_errors(shape, torch.float32, *flags)) < 1e-6


def test_triton_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_kernels"]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert f"{len(GRIDS) + len(SHAPES)} passed" in ran.stdout


SOURCES = [
    (route_conv_cuda.SOURCE, route_conv_cuda.defines(torch.bfloat16, 4, 8)),
    (route_conv_cuda.SOURCE, route_conv_cuda.defines(torch.float32, 2, 1)),
    (route_conv_cuda.SOURCE, route_conv_cuda.defines(torch.float16, 1, 2)),
    (gated_merge_cuda.SOURCE, gated_merge_cuda.defines(torch.bfloat16, torch.bfloat16, torch.bfloat16, 8, 2)),
    (gated_merge_cuda.SOURCE, gated_merge_cuda.defines(torch.float32, torch.float16, torch.float32, 1, 3)),
    (add_norm_cuda.SOURCE, add_norm_cuda.defines(192, True, *(torch.bfloat16,) * 2, (True, True, False, False))),
    (add_norm_cuda.SOURCE, add_norm_cuda.defines(33, False, torch.float32, torch.float16, (False, False, True, True))),
    (route_weights_cuda.SOURCE, stored.defines(P=torch.float32, X=torch.bfloat16)),
]


@pytest.mark.skipif(nvrtc._library() is None, reason="PyTorch came without NVRTC")
@pytest.mark.parametrize("source, defines", SOURCES, ids=lambda value: getattr(value, "stem", ""))
def test_cuda_compiles(source, defines):
    flags = ["--gpu-architecture=sm_80", "--std=c++17", *(f"-D{define}" for define in defines)]
    assert b"forward" in nvrtc.compile(nvrtc.text_of(source), flags)


@pytest.mark.parametrize("channels, read", [(192, (2, 3)), (768, (4, 6)), (96, (1, 3)), (33, (1, 2)), (128, (4, 1))])
def test_lanes_of_a_row(channels, read):
    flags = (True, True, False, False)
    vector, per = f"VECTOR={read[0]}", f"PER={read[1]}"
    assert {vector, per} < set(add_norm_cuda.defines(channels, True, torch.float32, torch.float32, flags))
    assert "VECTOR=1" in add_norm_cuda.defines(channels, False, torch.float32, torch.float32, flags)


def test_types_of_a_kernel():
    assert stored.defines(H=torch.float32, X=torch.bfloat16) == ("T_BF16", "H=float", "X=real_t")
    assert stored.mixed(torch.float32, torch.float16) is None
    assert "got torch.float64" in (stored.mixed(torch.float64, torch.float16) or "")
    assert "got both" in (stored.mixed(torch.bfloat16, torch.float16) or "")


class TestOperators:
    def test_route_weights(self):
        torch.manual_seed(0)
        x_proj, dt_proj, A_log = torch.randn(2, 13, 6), torch.randn(2, 6, 3), torch.randn(2, 6, 5)
        into, out, A = route_weights(Projections(x_proj, dt_proj, A_log), 4, torch.float32)
        assert into.shape == (8, 24, 6) and out.shape == (8, 8, 6) and torch.equal(A, -A_log.exp())
        into, out = into.unflatten(0, (4, 2)), out.unflatten(0, (4, 2))
        assert all(torch.equal(i, x_proj) for i in into[:, :, [0, 1, 2, *range(8, 18)]])
        assert all(torch.equal(o, dt_proj.mT) for o in out[:, :, :3])
        assert not into[:, :, 3:8].any() and not into[:, :, 18:].any() and not out[:, :, 3:].any()

    @pytest.mark.parametrize("scan", ["bidirectional", "atrous"])
    def test_gated_merge(self, scan):
        torch.manual_seed(0)
        table, scan = Scan(scan).table(3, 5), Scan(scan)
        y = torch.randn(2, *table.routes.shape, 4, dtype=torch.float64)
        z = torch.randn(2, 15, 4, dtype=torch.float64)
        right = scan.merge(y, 3, 5).flatten(1, 2) / 2 * z * z.sigmoid()
        leaves = [y.clone().requires_grad_(), z.clone().requires_grad_()]
        assert torch.allclose(gated_merge(y, z, table, divisor=2), right, rtol=1e-12)
        assert torch.allclose(gated_merge(*leaves, table, divisor=2), right, rtol=1e-12)
        assert torch.autograd.gradcheck(partial(gated_merge, table=table, divisor=2), leaves)
        with pytest.raises(ValueError, match=r"y and z must be .* for these routes, got \(2, 15, 4\) and"):
            gated_merge(z, z, table)

    @pytest.mark.parametrize("module", [nn.RMSNorm(6, eps=1e-5), nn.LayerNorm(6), nn.LayerNorm(6, bias=False)])
    def test_add_norm(self, module):
        torch.manual_seed(0)
        module = module.double()
        nn.init.normal_(module.weight)
        h, r = torch.randn(2, 2, 3, 6, dtype=torch.float64).unbind()
        norm = Norm(module.weight, getattr(module, "bias", None), 1e-5, isinstance(module, nn.LayerNorm))
        x, stream = add_norm(h, r, norm, torch.float64)
        assert torch.allclose(x, module(h + r), rtol=1e-12) and torch.equal(stream, h + r)
        x, stream = add_norm(h, None, norm, torch.float64)
        assert torch.allclose(x, module(h), rtol=1e-12) and torch.equal(stream, h)
        with pytest.raises(ValueError, match=r"and \(c,\), got \(2, 3, 6\), \(3, 6\) and \(6,\)"):
            add_norm(h, r[0], norm, torch.float64)

    def test_a_norm_of_the_users_own(self):
        class Twice(nn.RMSNorm):
            def forward(self, x):
                return 2 * super().forward(x)

        h = torch.randn(2, 3, 6)
        x, r = add_then_norm(h, h, Twice(6, eps=1e-5))
        assert torch.equal(r, 2 * h) and torch.allclose(x, 2 * nn.RMSNorm(6, eps=1e-5)(2 * h))

    @pytest.mark.parametrize("settings", [{}, {"average": False}, {"rank": 8, "state": 4}, {"rank": 3, "state": 5}])
    @pytest.mark.parametrize("scan", ["bidirectional", "atrous"])
    def test_the_same_with_and_without_gradients(self, scan, settings):
        mixer = BiMamba(12, scan=scan, **{"state": 3, **settings}).double()
        x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
        with torch.no_grad():
            assert torch.allclose(mixer(x), (y := mixer.requires_grad_()(x)), rtol=1e-11)
        assert torch.allclose(mixer(x.requires_grad_()), y, rtol=1e-11)

    def test_other_gates(self):
        mixer = BiMamba(12, state=3, gate=nn.Sigmoid)
        x = torch.randn(1, 2, 3, 12)
        a, z = mixer.in_proj(x).chunk(2, -1)
        assert torch.allclose(mixer(x), mixer.out_proj(mixer.scan_map(a) * z.sigmoid()), atol=1e-6)

    def test_bfloat16_follows_float32(self):
        torch.manual_seed(0)
        mixer, x = BiMamba(64), torch.randn(2, 1, 50, 64)
        with torch.no_grad():
            right = mixer(x)
            got = mixer.bfloat16()(x.bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                cast = mixer.float()(x)
        assert got.dtype == cast.dtype == torch.bfloat16
        assert max(float((y.float() - right).norm() / right.norm()) for y in (got, cast)) < 1.5e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ROUNDING)
class TestGPU:
    @pytest.mark.parametrize("scan, grid, d", [*GRIDS, ("bidirectional", (1, 197), 384), ("spiral", (9, 4), 768)])
    def test_routes(self, scan, grid, d, dtype):
        for width in (1, 2, 4):
            assert conv_error(scan, grid, d, dtype, width, "cuda") < ROUNDING[dtype]
            with vmamba.use_backend("triton"):
                assert conv_error(scan, grid, d, dtype, width, "cuda") < ROUNDING[dtype]
        for backend in ("cuda", "triton"):
            with vmamba.use_backend(backend):
                assert merge_error(scan, grid, d, dtype, "cuda") < ROUNDING[dtype]

    @pytest.mark.parametrize("shape", [*SHAPES, (8, 197, 192), (2, 8192)])
    @pytest.mark.parametrize("flags", [(False, False, False), (True, True, False), (True, False, True)])
    def test_norms(self, shape, flags, dtype):
        for backend in ("cuda", "triton") if shape[-1] <= add_norm_cuda.WIDEST else ("triton",):
            with vmamba.use_backend(backend):
                assert max(norm_errors(shape, dtype, *flags, "cuda")) < ROUNDING[dtype]

    @pytest.mark.parametrize("k, d, r, n", [(2, 384, 12, 16), (4, 33, 3, 5), (1, 8, 8, 4)])
    def test_weights(self, k, d, r, n, dtype):
        for own in (torch.float32, dtype):
            given = make(k, r + 2 * n, d, dtype=own), make(k, d, r, dtype=own), make(k, d, n, dtype=own)
            right = route_weights_reference.forward(*given, 3, dtype)
            got = route_weights_cuda.forward(*(t.cuda() for t in given), 3, dtype)
            assert torch.equal(got[0].cpu(), right[0]) and far(got[1], right[1].double()) < 1e-6

    def test_patches(self, dtype):
        proj, x = PatchConv(3, 192, 16, 16).to(dtype), make(2, 3, 40, 70, dtype=dtype)
        right = proj.double()(x.double()).detach()
        with torch.no_grad():
            assert far(proj.to("cuda", dtype)(x.cuda()), right) < 2 * ROUNDING[dtype]

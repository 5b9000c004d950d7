"""CUDA C++ kernels compile without a GPU, for every architecture that PyTorch's packages serve; errors are told."""

import pytest
import torch

from vmamba.kernels import nvrtc, scan2d_cuda, selective_scan_cuda

pytestmark = pytest.mark.skipif(nvrtc._library() is None, reason="PyTorch came without NVRTC")


@pytest.mark.parametrize(
    "architecture, settings",
    [
        (90, (torch.bfloat16, 1, 6, True)),  # VMamba-T, first stage
        (80, (torch.float16, 1, 24, False)),
        (90, (torch.bfloat16, 64, 64, False)),
    ],
)
def test_scan2d_compiles(architecture, settings):
    flags = [f"-D{define}" for define in scan2d_cuda.defines(*settings)]
    text = nvrtc.text_of(scan2d_cuda.SOURCE)
    cubin = nvrtc.compile(text, [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *flags])
    assert cubin.startswith(b"\x7fELF") and b"backward" in cubin and b"forward" in cubin


@pytest.mark.parametrize("flags", ["T_BF16 N=16", "T_FP32 N=5", "T_FP16 N=32"])
def test_selective_scan_compiles(flags):
    defines = [f"-D{define}" for define in (flags + " HAS_D=1 HAS_Z=1 HAS_BIAS=1 SOFTPLUS=1").split()]
    text = nvrtc.text_of(selective_scan_cuda.SOURCE)
    cubin = nvrtc.compile(text, ["--gpu-architecture=sm_90", "--std=c++17", *defines])
    assert b"ends" in cubin and b"forward" in cubin


def test_a_mistake_is_told():
    with pytest.raises(RuntimeError, match=r'does not compile with -DN=1:\n.*identifier "undeclared" is undefined'):
        nvrtc.compile('extern "C" __global__ void f() { undeclared = 1; }', ["-DN=1"])


def test_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text, flags = 'extern "C" __global__ void f() {}', ["--gpu-architecture=sm_90"]
    first = nvrtc._cached(text, flags)
    monkeypatch.setattr(nvrtc, "compile", None)
    assert nvrtc._cached(text, flags) == first and len(list(tmp_path.rglob("*.cubin"))) == 1

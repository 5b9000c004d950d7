"""CUDA C++ kernels compile without a GPU, for every architecture that PyTorch's packages serve; errors are told."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch

from vmamba.kernels import (
    add_norm_cuda,
    depthwise_silu_cuda,
    gated_merge_cuda,
    instance_norm_cuda,
    layer_norm_cuda,
    nvrtc,
    route_conv_cuda,
    route_weights_cuda,
    scan2d_cuda,
    scan2d_plan,
    selective_scan_cuda,
    stored,
)
from vmamba.kernels import selective_scan_plan as plans
from vmamba.kernels.gpu import GPU

pytestmark = pytest.mark.skipif(nvrtc._library() is None, reason="PyTorch came without NVRTC")


@pytest.mark.parametrize(
    "architecture, settings",
    [
        (90, (torch.bfloat16, 1, 6, True)),  # VMamba-T, first stage
        (90, (torch.bfloat16, 1, 6, True, True, True)),  # the same, in segments
        (80, (torch.float16, 1, 24, False)),
        (90, (torch.bfloat16, 64, 64, False)),
    ],
)
def test_scan2d_compiles(architecture, settings):
    flags = [f"-D{define}" for define in scan2d_cuda.defines(*settings)]
    text = nvrtc.text_of(scan2d_cuda.SOURCE)
    cubin = nvrtc.compile(text, [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *flags])
    assert cubin.startswith(b"\x7fELF") and all(name in cubin for name in (b"backward", b"forward"))


@pytest.mark.parametrize(
    "architecture, sizes, n, rank, flags",
    [
        (90, (2, 8, 4), 16, 12, (True, True)),  # Vanilla-VMamba, first stage
        (80, (4, 4, 4, 22), 16, 12, (False, True)),
        (80, (4, 4, 1), 16, 5, (False, False)),
        (80, (4, 16, 1), 64, 64, (True, False)),
    ],
)
def test_scan2d_of_several_states_compiles(architecture, sizes, n, rank, flags):
    plan = scan2d_plan.Lanes(*sizes)
    defines = scan2d_cuda.forward_defines(plan, flags[0], torch.bfloat16, n, rank, *flags)
    text = nvrtc.text_of(scan2d_cuda.LANES_FORWARD)
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *(f"-D{define}" for define in defines)]
    assert b"forward" in nvrtc.compile(text, options)


@pytest.mark.parametrize("architecture, n, rank, whole", [(90, 1, 6, 1), (80, 16, 24, 0), (80, 64, 64, 1)])
def test_ends_of_segments_compile(architecture, n, rank, whole):
    defines = *scan2d_cuda._sizes(torch.float16, n, rank, False), f"WHOLE={whole}"
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *(f"-D{define}" for define in defines)]
    cubin = nvrtc.compile(nvrtc.text_of(scan2d_cuda.ENDS), options)
    assert all(name in cubin for name in (b"ends", b"backs"))


def test_layer_norm_compiles():
    half, full, kind = torch.bfloat16, torch.float32, layer_norm_cuda.Kind
    kinds = kind(full, half, half, full, True, True, True), kind(half, full, torch.float16, half)
    for chosen, rows in zip(kinds, ((96, True), (8191, False)), strict=True):
        flags = [f"-D{define}" for define in layer_norm_cuda.defines(chosen, layer_norm_cuda.plan(*rows))]
        text = nvrtc.text_of(layer_norm_cuda.SOURCE)
        cubin = nvrtc.compile(text, ["--gpu-architecture=sm_80", "--std=c++17", *flags])
        assert all(name in cubin for name in (b"backward", b"forward", b"finish"))


@pytest.mark.parametrize("settings", [(torch.bfloat16, 3, True), (torch.float32, 5, False)], ids=str)
def test_depthwise_silu_compiles(settings):
    flags = [f"-D{define}" for define in depthwise_silu_cuda.defines(*settings)]
    text = nvrtc.text_of(depthwise_silu_cuda.SOURCE)
    cubin = nvrtc.compile(text, ["--gpu-architecture=sm_90", "--std=c++17", *flags])
    assert all(name in cubin for name in (b"backward", b"forward", b"transposed"))


HALF, FULL = torch.bfloat16, torch.float32
PLANE = instance_norm_cuda.Kind(HALF, HALF, HALF, affine=True, act=True, add=True)
OTHERS = [
    (add_norm_cuda, add_norm_cuda.defines(192, True, FULL, HALF, (True,) * 4)),
    (gated_merge_cuda, gated_merge_cuda.defines(HALF, HALF, HALF, 8, 2)),
    (instance_norm_cuda, instance_norm_cuda.defines(PLANE, instance_norm_cuda.plan(4096, 2, False, True))),
    (route_conv_cuda, route_conv_cuda.defines(HALF, 4, 8)),
    (route_weights_cuda, stored.defines(P=FULL, X=HALF)),
]


@pytest.mark.parametrize("module, defines", OTHERS, ids=lambda t: getattr(t, "__name__", "").split(".")[-1])
def test_the_other_kernels_compile(module, defines):
    options = ["--gpu-architecture=sm_90", "--std=c++17", *(f"-D{define}" for define in defines)]
    assert b"forward" in nvrtc.compile(nvrtc.text_of(module.SOURCE), options)


@pytest.fixture
def driver(monkeypatch):
    """Stands for the driver and a machine with two GPUs; keeps what it is asked to launch, and answers ``status``."""
    fake = SimpleNamespace(current=0, status=0, launches=[], context=1)

    def launch(function, *rest):
        *size, stream, pointers, _ = rest
        slots = [ctypes.string_at(pointer, 8) for pointer in pointers]
        fake.launches.append((function, size, stream.value, slots, fake.current))
        return fake.status if fake.context else 201

    def explain(status, text):
        text._obj.value = b"too many resources"

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, fake.current = fake.current, self.index

        def __exit__(self, *error):
            fake.current = self.before

    def enter(context):
        fake.context = context.value
        return 0

    def retain(context, device):
        context._obj.value = 90 + device.value
        return 0

    def find(device, number):
        device._obj.value = number
        return 0

    functions = {"cuLaunchKernel": launch, "cuGetErrorString": explain, "cuCtxSetCurrent": enter}
    functions |= {"cuDeviceGet": find, "cuDevicePrimaryCtxRetain": retain}
    monkeypatch.setattr(nvrtc, "_cuda", lambda: SimpleNamespace(**functions))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: fake.current, raising=False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    return fake


def test_what_a_launch_passes(driver):
    kernel, x, y = nvrtc.Kernel(ctypes.c_void_p(5), 96, 0), torch.ones(3), torch.ones(2)
    kernel((4, 2), 256, x, y, -7, 0.5)
    kernel((1, 1), 32, y, x, 8, 0.25)
    (function, size, stream, slots, device), second = driver.launches
    assert (function.value, size, stream, device) == (5, [4, 2, 1, 256, 1, 1, 96], 70, 0)
    assert slots == [
        struct.pack("=Q", x.data_ptr()),
        struct.pack("=Q", y.data_ptr()),
        struct.pack("=i4x", -7),
        struct.pack("=f4x", 0.5),
    ]
    assert second[1] == [1, 1, 1, 32, 1, 1, 96] and second[3][2:] == [b"\x08" + bytes(7), struct.pack("=f4x", 0.25)]
    with pytest.raises(TypeError):
        nvrtc.Kernel(ctypes.c_void_p(5), 96, 0)((4, 2), 256, x, -7, y)  # tensors come first


def test_a_launch_runs_under_its_device(driver):
    nvrtc.Kernel(ctypes.c_void_p(5), 0, 1)((1, 1), 32, torch.ones(1))
    assert driver.launches[0][2] == 71 and driver.launches[0][4] == 1 and driver.current == 0


def test_a_thread_without_a_context_is_given_one(driver):
    driver.context = None
    nvrtc.Kernel(ctypes.c_void_p(5), 0, 0)((1, 1), 32, torch.ones(1))
    assert driver.context == 90 and len(driver.launches) == 2


def test_a_launch_that_fails_is_told(driver):
    driver.status = 701
    with pytest.raises(RuntimeError, match="cuLaunchKernel: too many resources"):
        nvrtc.Kernel(ctypes.c_void_p(5), 0, 0)((1, 1), 2048, torch.ones(1))
    with pytest.raises(struct.error):
        nvrtc.Kernel(ctypes.c_void_p(5), 0, 0)((1, 1), 32, 2**31)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(
    "dtype, n, d, z", [(torch.bfloat16, 16, 8, False), (torch.float32, 5, 7, True), (torch.float16, 64, 8, True)]
)
def test_selective_scan_compiles(dtype, n, d, z, few):
    u, maps = torch.zeros(1, 1, 1, d, dtype=dtype), torch.zeros(1, 1, 1, n, dtype=dtype)
    tensors = (u, u, torch.zeros(1, d, n), maps, maps, torch.zeros(1, d), u if z else None, None)
    inputs, gpu = selective_scan_cuda.Inputs(tensors, True), GPU(132 if few else 1, 227 * 1024)
    forward, backward = plans.forward(1, 64, n, gpu, 1970), plans.backward(1 if few else 1 << 10, 64, n, gpu)
    assert isinstance(backward, plans.StepLanes) == few
    for source, names, plan, more in (
        (selective_scan_cuda.SOURCE, (b"forward", b"ends"), forward, ("KEEP=1",) if few else ("KEEP=0", "NARROW")),
        (
            selective_scan_cuda.BACKWARD[type(backward)],
            (b"backward", b"backs") if few else (b"backward",),
            backward,
            selective_scan_cuda._backward_defines(backward, n, z, 197)[1],
        ),
    ):
        flags = ["--gpu-architecture=sm_90", "--std=c++17", *(f"-D{d}" for d in (*inputs.defines(plan), *more))]
        cubin = nvrtc.compile(nvrtc.text_of(source), flags)
        assert all(name in cubin for name in names)
    flags = ["--gpu-architecture=sm_80", f"-D{selective_scan_cuda.TYPES[dtype]}", f"-DN={n}"]
    assert b"fold" in nvrtc.compile(nvrtc.text_of(selective_scan_cuda.FOLD), flags)


def test_a_mistake_is_told():
    with pytest.raises(RuntimeError, match=r'does not compile with -DN=1:\n.*identifier "undeclared" is undefined'):
        nvrtc.compile('extern "C" __global__ void f() { undeclared = 1; }', ["-DN=1"])


def test_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text, flags = 'extern "C" __global__ void f() {}', ["--gpu-architecture=sm_90"]
    first = nvrtc._cached(text, flags)
    monkeypatch.setattr(nvrtc, "compile", None)
    assert nvrtc._cached(text, flags) == first and len(list(tmp_path.rglob("*.cubin"))) == 1

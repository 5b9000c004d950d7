"""CUDA C++ kernels without a compiler on the user's machine: NVRTC, which comes with PyTorch, makes them on first use.

What was compiled is kept in ``$XDG_CACHE_HOME/vmamba`` (``~/.cache/vmamba``), by source, options, GPU and compiler.
"""

import ctypes
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from struct import Struct
from threading import Lock

import torch
from torch import Tensor

COMMON = Path(__file__).with_name("scan_common.cu")
SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class Kernel:
    """A compiled function on one device; called with a grid, threads per block and its arguments."""

    def __init__(self, function: c_void_p, shared: int, device: int):
        self.function, self.shared, self.device = function, shared, device
        self._lock = Lock()
        self._slots: _Slots | None = None

    def __call__(self, grid: tuple[int, int], threads: int, *arguments: Tensor | int | float) -> None:
        """Launch on the device's current stream; tensors, which come first, are passed as pointers, numbers in 32 bits.

        Raises:
            RuntimeError: the driver refuses the launch; struct.error: an integer does not fit in 32 bits.
        """
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self(grid, threads, *arguments)
        slots = self._slots = self._slots or _Slots(arguments)
        pointers = map(Tensor.data_ptr, arguments[: slots.tensors])  # pyright: ignore[reportArgumentType]
        stream = c_void_p(torch._C._cuda_getCurrentRawStream(self.device))
        with self._lock:
            slots.pack_into(slots.memory, 0, *pointers, *arguments[slots.tensors :])
            call = self.function, *grid, 1, threads, 1, 1, self.shared, stream, slots.pointers, None
            status = _cuda().cuLaunchKernel(*call)
            if status == INVALID_CONTEXT:
                _bind(self.device)
                status = _cuda().cuLaunchKernel(*call)
        if status:
            raise _error("cuLaunchKernel", status)


class _Slots:
    """Where the arguments of a kernel lie, 8 bytes for each: made once, filled for every launch."""

    def __init__(self, arguments: Sequence[Tensor | int | float]):
        self.tensors = sum(isinstance(a, Tensor) for a in arguments)
        kinds = ("Q" if isinstance(a, Tensor) else "f4x" if isinstance(a, float) else "i4x" for a in arguments)
        self.pack_into = Struct("=" + "".join(kinds)).pack_into
        self.memory = ctypes.create_string_buffer(8 * len(arguments))
        first = ctypes.addressof(self.memory)
        self.pointers = (c_void_p * len(arguments))(*range(first, first + 8 * len(arguments), 8))


@cache
def why_not() -> str | None:
    """None where kernels can be compiled for the current GPU, else the reason in plain words."""
    if torch.version.cuda is None:
        return "PyTorch was built without CUDA"
    if _library() is None:
        return "NVRTC, CUDA's run-time compiler, was not found beside PyTorch"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU here"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"it needs an NVIDIA GPU of compute capability 8.0, this one has {torch.cuda.get_device_capability()}"
    return None


@cache
def kernel(source: Path, name: str, defines: tuple[str, ...], device: int, shared: int = 0) -> Kernel:
    """The function ``name`` of a source file with ``defines`` ("N=1", ...), for the CUDA device number ``device``.

    Args:
        shared: bytes of dynamic shared memory that a block takes.

    Raises:
        RuntimeError: it cannot be compiled; the message has the compiler's log.
    """
    module, function = _module(source, defines, device), c_void_p()
    _driver("cuModuleGetFunction", byref(function), module, name.encode())
    if shared > 48 * 1024:
        _driver("cuFuncSetAttribute", function, SHARED_ATTRIBUTE, shared)
    return Kernel(function, shared, device)


def text_of(source: Path) -> str:
    """What is compiled of a source file: what all share, and itself with the files beside it that it includes."""
    own = re.sub(r'^#include "(.+)"$', lambda m: source.with_name(m[1]).read_text(), source.read_text(), flags=re.M)
    return COMMON.read_text() + own


@cache
def _module(source: Path, defines: tuple[str, ...], device: int) -> c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *(f"-D{define}" for define in defines)]
    text = text_of(source)
    cubin = _cached(text, options)
    module = c_void_p()
    with torch.cuda.device(device):
        _bind(device)
        _driver("cuModuleLoadData", byref(module), cubin)
    return module


def _bind(device: int) -> None:
    """Make the device's primary context, which is PyTorch's, current: autograd's threads start without one."""
    handle, context = c_int(), c_void_p()
    _driver("cuDeviceGet", byref(handle), device)
    _driver("cuDevicePrimaryCtxRetain", byref(context), handle)
    _driver("cuCtxSetCurrent", context)


def _cached(text: str, options: Sequence[str]) -> bytes:
    key = hashlib.sha256("\n".join((text, *options, _version())).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vmamba")
    file = folder / f"{key}.cubin"
    if file.is_file():
        return file.read_bytes()
    cubin = compile(text, options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(cubin)
        part.replace(file)
    except OSError:
        pass  # a home that cannot be written to: compiled again next time
    return cubin


def compile(text: str, options: Sequence[str]) -> bytes:
    """CUDA C++ to machine code for one architecture; works without a GPU.

    Raises:
        RuntimeError: it does not compile, or there is no NVRTC; the message has the compiler's log.
    """
    library = _library()
    if library is None:
        raise RuntimeError("NVRTC, CUDA's run-time compiler, was not found beside PyTorch")
    program = c_void_p()
    library.nvrtcCreateProgram(byref(program), text.encode(), b"vmamba.cu", 0, None, None)
    failed = library.nvrtcCompileProgram(program, len(options), (c_char_p * len(options))(*map(str.encode, options)))
    if failed:
        log = _content(library, program, "ProgramLog").decode(errors="replace")
        raise RuntimeError(f"a CUDA kernel does not compile with {' '.join(options)}:\n{log}")
    cubin = _content(library, program, "CUBIN")
    library.nvrtcDestroyProgram(byref(program))
    return cubin


def _content(library: ctypes.CDLL, program: c_void_p, what: str) -> bytes:
    size = c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


@cache
def _version() -> str:
    major, minor, library = c_int(), c_int(), _library()
    if library is not None:
        library.nvrtcVersion(byref(major), byref(minor))
    return f"nvrtc {major.value}.{minor.value}"


@cache
def _library() -> ctypes.CDLL | None:
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _candidates() -> Iterator[str]:
    major = (torch.version.cuda or "").split(".")[0]
    yield f"libnvrtc.so.{major}"
    packages = Path(torch.__file__).parents[1]
    for pattern in (f"nvidia/*/lib/libnvrtc.so.{major}", "nvidia/*/bin/**/nvrtc64_*.dll", "torch/lib/*nvrtc*"):
        yield from map(str, sorted(packages.glob(pattern)))


@cache
def _cuda() -> ctypes.CDLL:
    """The driver; of its functions' arguments no types are declared, which ctypes would check at every launch."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _driver(function: str, *arguments) -> None:
    status = getattr(_cuda(), function)(*arguments)
    if status:
        raise _error(function, status)


def _error(function: str, status: int) -> RuntimeError:
    text = c_char_p()
    _cuda().cuGetErrorString(status, byref(text))
    return RuntimeError(f"{function}: {(text.value or b'unknown error').decode()}")

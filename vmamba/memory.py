"""Memory of one step of work: how much it needs at most, and how much it moves.

Bytes moved are counted, not measured. Eager: every PyTorch operator reads each of its tensors once and writes each
result once; views move nothing; caches are not modelled. A hand-written kernel outside PyTorch's operators is seen by
the memory that it is given (``empty_like``). Compiled: Inductor's own count over the kernels that it makes.
"""

import ctypes
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmamba.clock import Step

PEAK = "what a candidate holds (weights, inputs, CUDA graphs of its compiler) and the most that a step allocates above"
MOVED = "each PyTorch operator reads its tensors once and writes its results once; views move nothing"
MOVED_COMPILED = "Inductor's count over the kernels that it makes"
STATUS, SYSTEM, RESET = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/proc/self/clear_refs")


def size_of(tensors: Iterable[Any]) -> int:
    """Bytes of what among these are tensors; what ``expand`` repeats counts once."""
    return sum(_size(t) for t in tensors if isinstance(t, Tensor))


def _size(t: Tensor) -> int:
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or not n)


def peak(step: Step, device: torch.device) -> int | None:
    """Bytes that one ``step`` needs at most, above what there is before it.

    On a GPU what PyTorch allocates; on a CPU what the process grows by, which only Linux tells: None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not RESET.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back first, so that it counts when it is taken again
    RESET.write_text("5")  # the peak is that of now (man 5 proc)
    before = _kibibytes(STATUS, "VmRSS")
    step()
    return 1024 * (_kibibytes(STATUS, "VmHWM") - before)


def kept_by_graphs(device: torch.device) -> int:
    """Bytes that CUDA graphs keep for themselves on a GPU, as those of ``torch.compile`` do; :func:`peak` sees none."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = (s for s in torch.cuda.memory_snapshot() if s["device"] == index)
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


@contextmanager
def kept_free(device: torch.device) -> Iterator[None]:
    """On Linux a process that takes all memory is killed: within, it is refused more than four fifths of what is free.

    For a CPU ``device`` only; a GPU refuses by itself.
    """
    if device.type != "cpu" or not SYSTEM.exists():
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    most = _kibibytes(STATUS, "VmData") + 4 * _kibibytes(SYSTEM, "MemAvailable") // 5
    bounds = [bound for bound in (most * 1024, *limits) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def _kibibytes(path: Path, name: str) -> int:
    (line,) = (line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def moved(step: Step) -> int:
    """Bytes that one eager ``step`` moves; runs it twice, since the first may have tables to make."""
    step()
    with _Traffic() as traffic:
        step()
    return traffic.bytes


def moved_compiled(step: Step) -> int:
    """Bytes that the kernels made for ``step`` move; runs it once, which must be its first run: it is compiled anew."""
    from torch._functorch import config as functorch
    from torch._inductor import compile_fx, config, metrics

    log, before = compile_fx.inductor_metrics_log, metrics.num_bytes_accessed
    level, silent = log.level, logging.Filter("nothing is to be printed")
    log.addFilter(silent)
    log.setLevel(logging.INFO)  # Inductor counts for its log alone
    try:
        with config.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
            step()
    finally:
        log.setLevel(level)
        log.removeFilter(silent)
    return metrics.num_bytes_accessed - before


class _Traffic(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.state = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            result = func(*args, **(kwargs or {}))
        else:  # one written in Python may differentiate inside, which a mode would not let it
            with torch._C._ForceDispatchKeyGuard(*self.state), torch.no_grad():
                result = func(*args, **(kwargs or {}))
        read, written = tree_leaves((args, kwargs)), tree_leaves(result)
        memory = {t.untyped_storage()._cdata for t in read if isinstance(t, Tensor)}
        new = any(isinstance(t, Tensor) and t.untyped_storage()._cdata not in memory for t in written)
        if new or func._schema.is_mutable:
            self.bytes += size_of(read) + size_of(written)
        return result

"""How long one step of work takes, on the CPU by its clock, on a GPU by CUDA events; and steps as CUDA graphs."""

import time
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

COLD_BYTES = 1 << 29  # more than any cache
LOCALS = 9000  # with them CPython takes a chunk of 128 KiB for a frame, of which 56 KiB are left

Step = Callable[[], Any]


def seconds(step: Step, device: torch.device, cold: Tensor | None = None) -> float:
    """Seconds of one ``step``.

    On a GPU that is idle first, as a caller finds it, the host's time to issue the work counts. ``cold``, the result of
    :func:`cold_memory`, is written over before, which empties caches; the host issues the step meanwhile, and what is
    left is the time of the kernels (as long as the host takes less than that writing).
    """
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if cold is not None:
        cold.zero_()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def with_room(work: Callable[[], Any]) -> Any:
    """``work()`` with all its frames in one chunk of the interpreter's memory: its depth in the program does not count.

    CPython keeps frames in chunks of 16 KiB and gives a chunk back to the system when the first frame in it returns. A
    loop whose calls begin just where a chunk ends takes one and gives it back each time, 10 to 20 microseconds; the
    functions that ``torch.compile`` makes fill most of a chunk, and then that may happen at each of their launches.
    """
    return _wide(work)


def _call(work: Callable[[], Any]) -> Any:
    return work()


_names = "work", *(f"unused_{i}" for i in range(LOCALS - 1))
_wide = FunctionType(_call.__code__.replace(co_nlocals=LOCALS, co_varnames=_names), {})


def cold_memory(device: torch.device) -> Tensor | None:
    """Memory larger than the caches of a GPU; None on a CPU, where nothing is emptied."""
    return torch.empty(COLD_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None


def graphed(step: Step) -> Step:
    """The replay of a CUDA graph of ``step``, in which the host has no part; inputs stay where they are.

    It keeps ``step``, and so the weights and inputs that the graph reads.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, kept: Step) -> None:
    graph.replay()

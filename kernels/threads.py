"""Threads for the CPU kernels: the team of PyTorch's own OpenMP, so that the two never compete for a core.

After a parallel PyTorch operator its OpenMP threads keep spinning for the next one, and a thread of anyone else's must
take the core from them: on two cores that costs half the gain. Where PyTorch comes without GNU OpenMP (macOS, Windows,
other builds), and after a fork, which GNU OpenMP does not survive, a pool of Python threads does the work instead.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

PIECE = 50_000  # numbers to compute, below which sharing costs more than it brings
_Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pools: list[ThreadPoolExecutor] = []
_forked: list[bool] = []


def share(kernel: Callable[..., None], tasks: int, work: int, *arguments: Any) -> None:
    """Run ``kernel(first, last, *arguments)`` over all ``tasks``, on up to ``torch.get_num_threads()`` threads.

    The kernel releases the GIL and its tasks write apart from each other, so results do not depend on the spreading.
    ``work`` is about how many numbers the tasks compute: a small job stays on the calling thread. Threads take pieces
    as they come free, so one that gets no core delays nothing but the piece that it holds.
    """
    threads = torch.get_num_threads()
    count = min(tasks, 4 * threads, max(work // PIECE, 1)) if threads > 1 else min(tasks, 1)
    pieces = [(tasks * i // count, tasks * (i + 1) // count) for i in range(count)]
    errors: list[Exception] = []

    def take(*_: Any) -> None:
        while pieces:
            try:
                piece = pieces.pop()
            except IndexError:  # another thread was faster
                return
            try:
                kernel(*piece, *arguments)
            except Exception as error:
                errors.append(error)

    threads = min(threads, count)
    if threads < 2:
        take()
    elif (team := _openmp()) and not _forked:
        team(_Task(take), None, threads, 0)
    else:
        helpers = [_pool().submit(take) for _ in range(threads - 1)]
        take()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
    if errors:
        raise errors[0]


@cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the OpenMP that PyTorch brought along, or None."""
    root = Path(torch.__file__).parent
    for path in (*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")):
        try:
            team = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        team.argtypes = [_Task, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        team.restype = None
        return team
    return None


def _pool() -> ThreadPoolExecutor:
    if not _pools:
        _pools.append(ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="vmamba"))
    return _pools[0]


def _after_fork() -> None:
    _pools.clear()
    _forked.append(True)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)

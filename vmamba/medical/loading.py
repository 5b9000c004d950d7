"""Processes that load batches: as many as shared memory has room for, and what it means when one of them dies."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

SHARED = Path("/dev/shm")  # where Linux keeps the batches on their way from the processes
SHARE = 0.5  # of what is free there may be batches that wait
AHEAD = 2  # batches that a process makes beforehand
MORE = "docker run --shm-size=8g or --ipc=host gives more"
FULL = f"shared memory is full, {{free}}; {MORE}, and fewer --workers or a smaller --batch-size need less"
MEANINGS = {  # what PyTorch says of a process that loads -> what it means
    "Bus error": FULL,
    "unable to allocate shared memory": FULL,
    "unable to write to file </torch_": FULL,
    "signal: Killed": "the system ended it, most likely for want of main memory; fewer --workers need less",
    "signal: Segmentation fault": "it crashed; --workers 0 loads without processes",
    "exited unexpectedly": "it ended without a reason; --workers 0 loads without processes and shows what is wrong",
    "Too many open files": "too many files are open; raise the limit (ulimit -n 65536) or give fewer --workers",
}


def loader(data: Dataset, batches: Sampler, workers: int, *, ranks: int = 1, keep: bool = True) -> DataLoader:
    """Batches of ``data`` for the keys that ``batches`` gives, made by ``workers`` processes, or as many as fit.

    Args:
        data: takes such keys. batches: lists of keys.
        workers: processes; 0 for none.
        ranks: trainings that share this machine's memory.
        keep: the processes wait for the next epoch.
    """
    free = free_shared()
    if workers and free is not None:
        size, wanted = batch_bytes(data, batches), workers
        workers, ahead = fitting(workers, size, int(free * SHARE / ranks))
        if workers < wanted:
            room = f"{SHARED} has {free / 2**20:.0f} MiB free, a batch takes {size / 2**20:.1f}"
            print(f"{room}: {workers} of {wanted} processes load; {MORE}")
    else:
        ahead = AHEAD
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=keep and workers > 0,
    )


def fitting(workers: int, size: int, room: int) -> tuple[int, int]:
    """Processes, and batches of ``size`` bytes that each makes beforehand, so that all of them fit into ``room``."""
    places = room // max(size, 1)
    ahead = max(1, min(AHEAD, places // max(workers, 1)))
    return min(workers, places), ahead


def batch_bytes(data: Dataset, batches: Any) -> int:
    """Size of the first batch."""
    keys = next(iter(batches), [])
    if not keys:
        return 0
    item = data[keys[0]]
    parts = item if isinstance(item, tuple) else (item,)
    return len(keys) * sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


def free_shared() -> int | None:
    """Free bytes of shared memory; None where the system has no such folder."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else None


def meaning(error: RuntimeError) -> str | None:
    """What an error of PyTorch's loading means and what would do, in one line; None for another error."""
    text = _whole(error)
    if "DataLoader worker" not in text and "Communication with the workers" not in text:
        return None
    free = free_shared()
    left = "its size is not known" if free is None else f"{free / 2**20:.0f} MiB of {SHARED} are free now"
    for words, reason in MEANINGS.items():
        if words in text:
            return f"a process that loads died: {reason.format(free=left)}"
    return None


def stopped(error: RuntimeError) -> bool:
    """Whether a process that loads was asked to end, as the whole training was."""
    return "signal: Terminated" in _whole(error)


def _whole(error: BaseException) -> str:
    """The error and what it came from, which names the signal."""
    return " ".join(str(part) for part in (error, error.__cause__, error.__context__) if part)

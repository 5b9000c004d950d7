"""What the plans of kernels need to know of a GPU."""

from functools import cache
from typing import NamedTuple

import torch

RESERVED = 1024  # bytes of shared memory that a block takes besides its own


class GPU(NamedTuple):
    """Its multiprocessors, and bytes of shared memory that a block may have (by default, what any from 8.0 on has)."""

    processors: int
    shared: int = 99 * 1024

    def blocks(self, shared: int) -> int:
        """Of a multiprocessor that have memory beside each other, where each takes so many bytes."""
        return (self.shared + RESERVED) // (shared + RESERVED)


@cache
def gpu_of(device: torch.device) -> GPU:
    """That of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", GPU._field_defaults["shared"])
    return GPU(found.multi_processor_count, shared)

"""How busy a GPU is: the share of time in which a kernel or a copy runs on it, from PyTorch's profiler."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Trace:
    """Between :meth:`start` and :meth:`stop` everything that runs on the GPU is noted."""

    def __init__(self) -> None:
        with profile(activities=[ProfilerActivity.CUDA]):
            pass  # the first one of a process takes a second to begin, in which a queue would fill
        self._profile: Any = None

    def start(self) -> None:
        """Begins."""
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.start()

    def stop(self, device: torch.device) -> float | None:
        """The share of time, from the first kernel to the end of the last; None where the profiler sees none."""
        torch.cuda.synchronize(device)
        self._profile.stop()
        found = (event for event in self._profile.events() if event.device_type == DeviceType.CUDA)
        return covered((event.time_range.start, event.time_range.end) for event in found)


def covered(spans: Iterable[tuple[float, float]]) -> float | None:
    """Which share of the time from the first start to the last end lies in one of the spans (start, end)."""
    spans = sorted(spans)
    if not spans or spans[0][0] == max(end for _, end in spans):
        return None
    total, first = 0.0, spans[0][0]
    end = first
    for start, stop in spans:
        total += max(stop - max(start, end), 0)
        end = max(end, stop)
    return total / (end - first)

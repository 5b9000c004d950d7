"""How the forward of the CUDA C++ fused 2D scan shares out its work: numbers, chosen from sizes.

Few long routes are cut into segments (``scan2d_segments``).
"""

from collections.abc import Iterator
from typing import NamedTuple

from vmamba.kernels import scan2d_segments as segments
from vmamba.kernels.gpu import GPU
from vmamba.kernels.scan2d_segments import Scan
from vmamba.kernels.selective_scan_plan import StateLanes

SHARES = (4, 2, 1)  # states that a lane may have, the cheapest first
LANES = 4, 8, 16  # of a channel
PART, EIGHT = 16, 8  # steps and channels that the tensor cores do at once
TILE, SUMS, STEP, STATE = 220, 70, 2, 5  # instructions of a warp: for a tile, a part of it, a step, a state of a step
RESIDENT = 768  # threads of a multiprocessor, which bounds registers
IDLE = 2  # as long as so many more blocks would take, a multiprocessor waits
CYCLES = 1.7  # of a multiprocessor in a ns
SUMMED = 970  # float32 numbers that a large GPU reads in a ns


class Lanes(NamedTuple):
    """Lanes share states: states of a lane, lanes of a channel, groups of routes that run side by side, segments."""

    share: int
    lanes: int
    groups: int = 1
    segments: int = 1

    threads = StateLanes.threads
    channels = StateLanes.channels

    @property
    def steps(self) -> int:
        """Of a tile."""
        return PART if self.lanes == LANES[0] else 2 * PART

    def blocks(self, samples: int, channels: int) -> int:
        """Of a group of routes."""
        return samples * -(-channels // self.channels)

    def shared_bytes(self, states: int, rank: int) -> int:
        """Of a block's shared memory: the source's structure ``Shared``."""
        steps = self.steps
        move, maps = steps * (self.channels + 4) * 16, 2 * steps * 2 * self.lanes * self.share * 4
        y = 2 * (steps * (self.channels + 4) + steps // PART * max(4, 32 // self.lanes)) * 4
        copied = 4 * steps * ((self.channels + 8) * 2 + 4) + 2 * steps * _row_bytes(rank + 2 * states)
        fixed = 2 * self.channels * 4 + -(-rank // EIGHT) * self.channels // EIGHT * 256
        return -(-(move + maps + y + copied + fixed + self.threads * 16) // 16) * 16

    def defines(self, states: int, rank: int) -> tuple[str, ...]:
        """What the compiler is told."""
        sizes = f"S={self.share}", f"THREADS={self.threads}", f"BLOCKS={RESIDENT // self.threads}"
        return *sizes, f"BYTES={self.shared_bytes(states, rank)}"

    def resident(self, states: int, rank: int, gpu: GPU) -> int:
        """Blocks of a multiprocessor that run at once."""
        return min(RESIDENT // self.threads, gpu.blocks(self.shared_bytes(states, rank)))

    def time(self, scan: Scan, gpu: GPU) -> float:
        """ns, by the busiest multiprocessor, of the scan, of finding ends, and of the sum over groups."""
        blocks = self.groups * self.segments * self.blocks(scan.samples, scan.channels)
        each = (TILE / self.steps + SUMS / PART + STEP + STATE * self.share) * self.threads / 128
        resident = self.resident(scan.states, scan.rank, gpu)
        step = segments.busy(blocks, resident, gpu.processors, lambda count: (count + IDLE) * each / CYCLES)
        walk = step * segments.walk(scan.length, self.segments) * scan.routes / self.groups
        total = scan.samples * scan.channels * scan.length * (self.groups + 1) / SUMMED if self.groups > 1 else 0
        return walk + segments.ends(scan, gpu.processors, self.segments) + total


def _row_bytes(width: int) -> int:
    """Of a row of projected in shared memory: whole copies, as wide as lets few threads of a warp meet in a bank."""
    at_once = 16 if width % 8 == 0 else 8 if width % 4 == 0 else 4
    words = -(-2 * width // at_once) * at_once // 4
    return 4 * (words if at_once == 16 else (words + 1) // 4 * 4 + 2)


def possible(states: int) -> Iterator[tuple[int, int]]:
    """States of a lane and lanes of a channel."""
    for share in SHARES:
        lanes = max(LANES[0], 1 << max(0, -(-states // share) - 1).bit_length())
        if lanes in LANES and (share == 1 or lanes * share < 2 * states):
            yield share, lanes


def forward(scan: Scan, gpu: GPU) -> Lanes:
    """The fastest by :meth:`Lanes.time`."""
    groups = [size for size in range(1, scan.routes + 1) if scan.routes % size == 0]
    plans = [Lanes(*sizes, size) for size in groups for sizes in possible(scan.states)]
    for plan in [plan for plan in plans if plan.groups == scan.routes]:
        blocks = scan.routes * plan.blocks(scan.samples, scan.channels)
        resident = plan.resident(scan.states, scan.rank, gpu)
        more = segments.counts(blocks, resident, gpu.processors, scan.length)[1:]
        plans += [plan._replace(segments=count) for count in more]
    return min(plans, key=lambda plan: plan.time(scan, gpu))

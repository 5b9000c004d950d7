"""How the backward of the fused 2D scan shares out its work where there are several states: numbers, chosen from sizes.

``scan2d_lanes_backward.cu`` explains them.
"""

from functools import cache
from typing import NamedTuple

from vmamba.kernels import scan2d_segments as segments
from vmamba.kernels.gpu import GPU
from vmamba.kernels.scan2d_segments import Scan
from vmamba.kernels.selective_scan_plan import StateLanes
from vmamba.kernels.selective_scan_reference import CHUNK

STATES = range(4, 65)  # with fewer there is too little to share
LANES = (4, 8, 16)  # of a channel
SHARES = (1, 2, 4)  # states that a lane may have
PART = 8  # steps in registers
MOST_THREADS = 256  # of a block
WARP = 32
ALIGNED = 16  # bytes: to multiples of it a structure's size is rounded
RESIDENT = 384  # threads of a multiprocessor, by their registers
WAIT, ISSUE = 170, 40  # ns of a step, and more for each block of a multiprocessor; 4 states of a lane; estimates
ADDED = 1.15  # times as long where channels of a block are added to others; measured: up to 1.12
SPEED = 1650  # bytes a ns for parts, which are written and read


class Lanes(NamedTuple):
    """Lanes share states.

    Args:
        states: n. rank: r. share: states of a lane. lanes: of a channel.
    """

    states: int
    rank: int
    share: int
    lanes: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return min(MOST_THREADS, WARP * self.lanes)

    channels = StateLanes.channels

    @property
    def shared_bytes(self) -> int:
        """Of a block's shared memory: the source's structure ``Backward``."""
        maps, ranks, rows = 2 * self.lanes * self.share, -(-self.rank // 8) * 8, self.rank + 2 * self.states
        floats = CHUNK * (2 * (self.channels + 2) + maps + self.channels)  # move, maps, dy
        floats += (CHUNK // PART - 1) * self.share * self.threads  # before
        floats += ranks * (self.channels + 8) + self.channels  # weight, shift
        floats += 2 * self.threads // WARP * PART * (maps + 1)  # d_maps
        halves = CHUNK * (self.channels + rows + ranks + 2)  # x, rows, factor
        return -(-(4 * floats + 2 * halves + 4 * 2 * CHUNK) // ALIGNED) * ALIGNED  # and pixel

    def resident(self, gpu: GPU) -> int:
        """Blocks of a multiprocessor that run at once."""
        return min(RESIDENT // self.threads, gpu.blocks(self.shared_bytes))

    def defines(self) -> tuple[str, ...]:
        """What the compiler is told beside the sizes."""
        return f"S={self.share}", f"THREADS={self.threads}", f"BYTES={self.shared_bytes}"


class Blocks(NamedTuple):
    """Side by side: groups of routes, blocks across the channels, segments; one after the other: a block's channels.

    ``span`` is how many groups of them.
    """

    groups: int
    across: int
    span: int
    segments: int = 1


def lanes(states: int, rank: int, shared: int) -> Lanes | None:
    """For so many states and ranks on a GPU where a block may have ``shared`` bytes; None where it does not fit."""
    if states not in STATES:
        return None
    share = next((s for s in SHARES if s * LANES[0] >= states), SHARES[-1])
    plan = Lanes(states, rank, share, next(count for count in LANES if count * share >= states))
    return plan if plan.shared_bytes <= shared else None


@cache
def spread(plan: Lanes, scan: Scan, gpu: GPU) -> Blocks:
    """What takes the least time by an estimate: steps on the busiest multiprocessor, and parts of sums in memory."""
    pieces, resident = -(-scan.channels // plan.channels), plan.resident(gpu)
    spans = {-(-pieces // across) for across in range(1, pieces + 1)}
    shares = [groups for groups in range(1, scan.routes + 1) if scan.routes % groups == 0]
    possible = [Blocks(groups, -(-pieces // span), span) for groups in shares for span in sorted(spans)]
    cuts = segments.counts(scan.samples * pieces * scan.routes, resident, gpu.processors, scan.length)[1:]
    possible += [Blocks(scan.routes, pieces, 1, count) for count in cuts]

    def together(count: int) -> float:  # ns of a step of so many blocks of a multiprocessor
        return (WAIT + ISSUE * count * plan.threads / 128) * (1 + plan.share) / 5

    def time(chosen: Blocks) -> float:  # ns
        blocks = scan.samples * chosen.across * chosen.groups * chosen.segments
        turns = scan.routes // chosen.groups * chosen.span * (ADDED if chosen.span > 1 else 1)
        steps = turns * segments.walk(scan.length, chosen.segments)
        parts = chosen.groups * scan.channels + chosen.across * scan.routes * (plan.rank + 2 * plan.states)
        sums = scan.samples * parts * scan.length * 4 / SPEED
        ends = segments.ends(scan, gpu.processors, chosen.segments)
        return steps * segments.busy(blocks, resident, gpu.processors, together) + ends + sums

    return min(possible, key=time)

"""How the CUDA C++ selective scan shares out its work: numbers, chosen from sizes and the GPU's.

Constants were measured on an H200 (132 multiprocessors); docs/performance.md has the times.
"""

from typing import NamedTuple

from vmamba.kernels.gpu import GPU
from vmamba.kernels.selective_scan_reference import CHUNK

# states that a lane may have, the cheapest first: ns that the forward takes of a multiprocessor for a step of 4 warps,
# and what a step takes however many there are
PASS = {4: (25.0, 12.0), 2: (14.0, 18.0), 1: (10.0, 22.0)}
SEGMENT = 300.0  # ns that each segment takes, whose end those after it read
MOST_LANES = 16
TILE = 16  # steps; segments are made of whole ones
MANY_WARPS = 24  # of a multiprocessor: the backward needs no lanes that share steps
SUB = 8  # steps that selective_scan_backward.cu has in registers
STEP_LANES, CHANNEL_LANES = 8, 4  # of a warp, where lanes share steps
MOST_THREADS = 384  # of a block, where lanes share steps
SHORT = 1024  # steps; the last chunk of longer ones is like the others; no segment of the backward is shorter
MOST_SEGMENTS = 64
TWICE = 1.4  # what a backward in segments takes of one that is not cut, for the pass before it
WORTH = 2  # times less work for the busiest multiprocessor, or there are no segments


class StateLanes(NamedTuple):
    """Lanes share states: states of a lane, lanes of a channel, segments of a sequence."""

    share: int
    lanes: int
    segments: int = 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return max(128, 16 * self.lanes)

    @property
    def channels(self) -> int:
        """Of a block."""
        return self.threads // self.lanes

    def defines(self) -> tuple[str, ...]:
        """What the compiler is told beside ``share``."""
        return (f"THREADS={self.threads}",)

    def shared_bytes(self, has_z: bool) -> int:
        """Of a block's shared memory in the backward: the source's structure ``Backward``."""
        states = self.lanes * self.share
        maps, before = CHUNK * 2 * states, CHUNK // SUB * self.share * self.threads
        d_maps = 2 * (self.threads // 32) * SUB * 2 * states
        return 4 * ((3 + has_z) * CHUNK * self.channels + maps + before + d_maps)


class StepLanes(NamedTuple):
    """Lanes share steps: channels of a block, states of a thread, groups of threads with other states of a channel.

    And segments of a sequence.
    """

    channels: int
    share: int
    groups: int
    segments: int = 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return STEP_LANES * self.channels * self.groups

    def defines(self) -> tuple[str, ...]:
        """What the compiler is told beside ``share``."""
        return (f"CHANNELS={self.channels}",)

    def shared_bytes(self, states: int, has_z: bool) -> int:
        """Of a block's shared memory: the source's ``Shared``, for as many ``states`` of a channel."""
        row, maps = self.channels * CHUNK, self.share * self.groups * (CHUNK + 4)
        sums = 2 * (maps + 16) * self.channels // CHANNEL_LANES
        return 4 * (3 * row + 2 * (maps + 8) + self.channels * states + sums + (2 + has_z) * self.groups * row)


def forward(sequences: int, channels: int, states: int, gpu: GPU, length: int) -> StateLanes:
    """Few lanes keep the work small, and many fill the GPU; so do segments, at the price of a second pass."""

    def time(plan: StateLanes) -> float:
        blocks = sequences * -(-channels // plan.channels) * max(1, plan.segments - 1)  # of each of the two passes
        busiest = -(-blocks // gpu.processors) * plan.threads / 128
        work, waiting = PASS[plan.share]
        passes = 2 if plan.segments > 1 else 1
        return passes * (work * busiest + waiting) * length / plan.segments + SEGMENT * plan.segments

    cuts = range(1, max(1, min(MOST_SEGMENTS, length // (2 * CHUNK))) + 1)
    return min((plan._replace(segments=cut) for plan in _state_lanes(states) for cut in cuts), key=time)


def backward(sequences: int, channels: int, states: int, gpu: GPU, length: int = 0) -> StateLanes | StepLanes:
    """Lanes share states where there are sequences enough, else steps."""
    lanes = _state_lanes(states)[0]
    many = sequences * channels * lanes.lanes >= MANY_WARPS * 32 * gpu.processors
    return lanes if many and lanes.shared_bytes(True) <= gpu.shared else steps(sequences, channels, states, gpu, length)


def steps(sequences: int, channels: int, states: int, gpu: GPU, length: int = 0) -> StepLanes:
    """Blocks that leave the busiest multiprocessor the least; a block costs about as much as 4 channels of it.

    Segments make up for channels that are few; each has at least ``SHORT`` steps.
    """
    possible = []
    cuts = [1 << i for i in range(MOST_SEGMENTS.bit_length()) if i == 0 or length >> i >= SHORT]
    for at_most in (4, 8):
        share = -(-states // -(-states // at_most))
        groups = -(-states // share)
        most = MOST_THREADS // (STEP_LANES * groups)
        sizes = range(CHANNEL_LANES, most + 1, CHANNEL_LANES)
        possible += [StepLanes(block, share, groups, cut) for block in sizes for cut in cuts]

    def work(plan: StepLanes) -> tuple[float, int]:
        blocks = sequences * -(-channels // plan.channels) * plan.segments
        each = (plan.channels + 4) / plan.segments * (TWICE * WORTH if plan.segments > 1 else 1)
        return -(-blocks // gpu.processors) * each, -plan.segments

    return min((plan for plan in possible if plan.shared_bytes(states, True) <= gpu.shared), key=work)


def tail(length: int) -> int:
    """Steps of a lane in the last chunk, where lanes share steps: what it takes, if that is a good part of all."""
    last = -(-((length - 1) % CHUNK + 1) // STEP_LANES)
    return 1 << (last - 1).bit_length() if length < SHORT else CHUNK // STEP_LANES


def _state_lanes(states: int) -> list[StateLanes]:
    """The cheapest first."""
    possible = [StateLanes(share, 1 << max(0, -(-states // share) - 1).bit_length()) for share in PASS]
    return [plan for plan in possible if plan.lanes <= MOST_LANES]

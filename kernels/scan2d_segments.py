"""How many segments few long routes of the fused 2D scan are cut into.

Times are in ns; constants were measured on an H200 (132 multiprocessors), with the CUDA C++ kernels (``scan2d_ends.cu``
finds the ends of segments).
"""

from collections.abc import Callable
from typing import NamedTuple

from vmamba.kernels.selective_scan_reference import CHUNK

SHORTEST, MOST = 2 * CHUNK, 64  # steps of a segment, and segments of a route
LONG = 1024  # steps; what a shorter route gains on the GPU, one more launch costs elsewhere
BEGIN = 56  # steps that could be taken while a block begins with a segment
CHANNELS, STATES = 32, 16  # of a block that finds an end
END, END_STATE = 7.0, 1.2  # of a step of such a block, and more for each state
PASS = 3500.0  # that finding ends takes however short they are


class Scan(NamedTuple):
    """Sizes: b samples, d channels, n states, r ranks, k routes of l steps."""

    samples: int
    channels: int
    states: int
    rank: int
    routes: int
    length: int


class Cut(NamedTuple):
    """Segments of a route: steps of each, whole chunks, but that the last may have fewer; and how many there are."""

    per: int
    count: int


def cut(length: int, count: int) -> Cut:
    """Into so many segments, or fewer where chunks are few."""
    per = max(1, -(-length // (count * CHUNK))) * CHUNK
    return Cut(per, -(-length // per))


def counts(blocks: int, resident: int, processors: int, length: int) -> list[int]:
    """Of segments that give each multiprocessor one block, two, ..., all that run at once; 1 for none comes first.

    Args: blocks: of a scan that is not cut. resident: blocks of a multiprocessor that run at once.
    """
    most = min(length // SHORTEST, MOST) if length >= LONG else 1
    return [1, *sorted({min(processors * each // blocks, most) for each in range(1, resident + 1)} - {0, 1})]


def walk(length: int, count: int) -> float:
    """Steps of each of so many segments, as long as it takes."""
    return length / count + (BEGIN if count > 1 else 0)


def ends(scan: Scan, processors: int, count: int) -> float:
    """What finding the ends of so many segments takes."""
    if count == 1:
        return 0
    blocks = scan.samples * -(-scan.channels // CHANNELS) * scan.routes * -(-scan.states // STATES) * (count - 1)
    return PASS + -(-blocks // processors) * (END + END_STATE * min(scan.states, STATES)) * scan.length / count


def busy(blocks: int, resident: int, processors: int, step: Callable[[int], float]) -> float:
    """Of a step on the busiest multiprocessor, where ``step(n)`` is that of n blocks which run at once."""
    rounds, rest = divmod(-(-blocks // processors), resident)
    return rounds * step(resident) + (step(rest) if rest else 0)

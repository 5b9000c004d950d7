"""How few long routes of the fused 2D scan are cut into segments, on an H200."""

import pytest

from vmamba.kernels import scan2d_cuda
from vmamba.kernels import scan2d_segments as segments
from vmamba.kernels.gpu import GPU
from vmamba.kernels.selective_scan_reference import CHUNK


@pytest.mark.parametrize("length", [1, 64, 65, 1023, 1024, 3136, 65537])
@pytest.mark.parametrize("blocks", [1, 12, 96, 131, 132, 133, 5000])
def test_segments_are_whole_chunks_and_not_too_short(blocks, length):
    counts = segments.counts(blocks, 3, 132, length)
    assert counts[0] == 1 and counts == sorted(set(counts))
    for count in counts:
        per, cut = segments.cut(length, count)
        assert not per % CHUNK and 1 <= cut <= count <= segments.MOST and (cut - 1) * per < length <= cut * per
        assert count == 1 or (length >= segments.LONG and per >= segments.SHORTEST and blocks * cut <= 3 * 132)


def test_ends_cost_nothing_where_there_is_one_segment():
    scan = segments.Scan(1, 96, 1, 6, 4, 65536)
    assert segments.ends(scan, 132, 1) == 0
    assert segments.PASS < segments.ends(scan, 132, 33) < segments.ends(scan, 132, 2)


def test_busy_multiprocessors_take_rounds():
    step = {1: 10, 2: 15}.__getitem__
    blocks = 1, 132, 133, 264, 265, 264 * 2 + 1
    assert [segments.busy(count, 2, 132, step) for count in blocks] == [10, 10, 15, 15, 25, 40]


@pytest.mark.parametrize(
    "name, sizes, cut",
    [
        # VMamba-T's first stage, one image of 1024 x 1024
        ("forward", (1, 96, 1, 6, 4, 65536), 33),
        ("backward", (1, 96, 1, 6, 4, 65536), 22),
        ("forward", (1, 96, 1, 6, 4, 3136), 11),  # of 224 x 224
        ("forward", (8, 96, 1, 6, 4, 3136), 1),
        ("forward", (1, 192, 1, 12, 4, 784), 1),
        ("backward", (128, 96, 1, 6, 4, 3136), 1),
    ],
)
def test_few_states(name, sizes, cut, monkeypatch):
    monkeypatch.setattr(scan2d_cuda, "gpu_of", lambda _: GPU(132, 227 * 1024))
    scan = segments.Scan(*sizes)
    groups, _, count = scan2d_cuda._grid.__wrapped__(name, scan, None)
    assert count == cut
    assert count == 1 or groups == scan.routes, "two routes of a block would need each other's segments"

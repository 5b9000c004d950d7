"""How the backward of the fused 2D scan for several states is shared out, and that what is chosen compiles."""

import itertools

import pytest
import torch

from vmamba.kernels import nvrtc, scan2d_cuda
from vmamba.kernels import scan2d_backward_plan as plans
from vmamba.kernels import scan2d_segments as segments
from vmamba.kernels.gpu import GPU

LARGE, SMALL = GPU(132, 227 * 1024), GPU(20)
NETWORKS = [  # samples, channels, routes, states, ranks
    (8, 192, 4, 16, 12),
    (30, 768, 4, 16, 24),
    (30, 1536, 4, 16, 48),
    (1, 96, 2, 8, 6),
    (256, 40, 4, 64, 3),
]


@pytest.mark.parametrize("rank", [1, 12, 64])
def test_states_are_shared_out_as_the_kernel_takes_them(rank):
    for states in plans.STATES:
        plan = plans.lanes(states, rank, LARGE.shared)
        assert plan is not None
        assert plan.lanes * plan.share >= states
        assert plan.threads == plan.lanes * plan.channels
        assert not plan.channels % 16
        assert plan.shared_bytes <= LARGE.shared


def test_what_does_not_fit_is_left_to_the_other_kernel():
    assert plans.lanes(3, 12, LARGE.shared) is None
    assert plans.lanes(65, 12, LARGE.shared) is None
    assert plans.lanes(16, 12, SMALL.shared) is not None
    assert plans.lanes(64, 64, SMALL.shared) is None


@pytest.mark.parametrize("samples, channels, routes, states, rank", NETWORKS)
@pytest.mark.parametrize("gpu", [LARGE, LARGE._replace(processors=20)], ids=str)
@pytest.mark.parametrize("length", [1, 196, 65536])
def test_each_channel_and_route_is_some_block_s(samples, channels, routes, states, rank, gpu, length):
    plan = plans.lanes(states, rank, LARGE.shared)
    assert plan is not None
    scan = segments.Scan(samples, channels, states, rank, routes, length)
    groups, across, span, count = plans.spread(plan, scan, gpu)
    assert not routes % groups
    assert count == 1 or (length >= segments.LONG and (groups, span) == (routes, 1))
    assert (across - 1) * span * plan.channels < channels <= across * span * plan.channels


def test_few_blocks_take_one_route_each_and_many_share_the_memory_for_sums():
    few, many = (plans.lanes(16, rank, LARGE.shared) for rank in (12, 48))
    assert few is not None
    assert many is not None
    assert plans.spread(few, segments.Scan(8, 192, 16, 12, 4, 784), LARGE) == (4, 6, 1, 1)
    assert plans.spread(many, segments.Scan(128, 1536, 16, 48, 4, 196), LARGE).span > 1
    assert plans.spread(few, segments.Scan(1, 192, 16, 12, 4, 4096), LARGE) == (4, 6, 1, 16)


@pytest.mark.skipif(nvrtc._library() is None, reason="PyTorch came without NVRTC")
@pytest.mark.parametrize(
    "architecture, states, rank, settings",
    [
        (90, 16, 12, (torch.bfloat16, True, True, False)),  # the second stage of networks with 16 states
        (80, 5, 1, (torch.float16, False, False, True)),
        (90, 64, 3, (torch.bfloat16, True, False, True)),
    ],
)
def test_it_compiles(architecture, states, rank, settings):
    plan = plans.lanes(states, rank, LARGE.shared)
    assert plan is not None
    sizes = scan2d_cuda._sizes(settings[0], states, rank, True)
    told = scan2d_cuda.backward_defines(plan, *settings, log_A=True), sizes
    sources = (scan2d_cuda.LANES_BACKWARD, b"backward"), (scan2d_cuda.SUMS, b"totals")
    for defines, (source, name) in zip(told, sources, strict=True):
        flags = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *(f"-D{define}" for define in defines)]
        assert name in nvrtc.compile(nvrtc.text_of(source), flags)


def test_blocks_of_a_multiprocessor_are_bounded_by_memory_and_registers():
    sizes = itertools.product((4, 16, 64), (1, 64))
    counts = [plan.resident(LARGE) for size in sizes if (plan := plans.lanes(*size, LARGE.shared))]
    assert counts == [3, 3, 3, 2, 1, 1]

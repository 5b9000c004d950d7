"""How the CUDA C++ selective scan shares out its work, on an H200 if nothing else is said."""

import pytest

from vmamba.kernels import selective_scan_plan as plans
from vmamba.kernels.gpu import GPU
from vmamba.kernels.selective_scan_cuda import STATES

H200 = GPU(132, 227 * 1024)
SIZES = [(128, 384, 197), (8, 384, 6085), (4, 384, 16385), (32, 192, 3136), (1, 384, 65536), (2, 7, 1)]


@pytest.mark.parametrize(
    "sequences, length, plan",
    [
        (128, 197, (4, 4, 1)),  # Vim-Ti at 224 in training: the cheapest
        (16, 6085, (4, 4, 3)),
        (8, 6085, (4, 4, 5)),  # at 1248: 4 segments in each pass, 384 blocks for 132 multiprocessors
        (4, 16385, (4, 4, 23)),
        (1, 65536, (4, 4, 56)),
        (8, 197, (4, 4, 1)),  # too short for segments
    ],
)
def test_forward(sequences, length, plan):
    assert plans.forward(sequences, 384, 16, H200, length) == plan


@pytest.mark.parametrize(
    "sequences, plan",
    [
        (128, plans.StateLanes(4, 4)),
        (16, plans.StepLanes(24, 8, 2)),
        (8, plans.StepLanes(24, 8, 2)),  # 128 blocks for 132 multiprocessors
        (4, plans.StepLanes(12, 4, 4)),  # 128 again
        (1, plans.StepLanes(4, 4, 4)),
    ],
)
def test_backward(sequences, plan):
    chosen = plans.backward(sequences, 384, 16, H200)
    assert chosen == plan and type(chosen) is type(plan)


@pytest.mark.parametrize(
    "sequences, channels, length, segments",
    [
        (2, 64, 40 * 224 * 192, 64),  # U-Mamba's volume
        (12, 64, 512 * 512, 1),  # LightM-UNet's images: enough of them
        (1, 384, 6085, 1),  # would win too little
        (2, 64, 9000, 8),  # as many as have enough steps
        (2, 64, 2 * plans.SHORT - 1, 1),
        (8, 384, 6085, 1),  # there are blocks enough
    ],
)
def test_segments_of_the_backward(sequences, channels, length, segments):
    plan = plans.backward(sequences, channels, 16, H200, length)
    assert isinstance(plan, plans.StepLanes) and plan.segments == segments


@pytest.mark.parametrize("gpu", [H200, GPU(20), GPU(1)], ids=str)
@pytest.mark.parametrize("states", STATES)
def test_every_state_has_its_lane(states, gpu):
    for sequences, channels, length in SIZES:
        plan = plans.forward(sequences, channels, states, gpu, length)
        assert plan.share * plan.lanes >= states and plan.lanes <= plans.MOST_LANES and plan.segments >= 1
        assert plan.channels * plan.lanes == plan.threads <= 256
        plan = plans.steps(sequences, channels, states, gpu)
        assert plan.share * plan.groups >= states > plan.share * (plan.groups - 1) and plan.share <= 8
        assert plan.channels % plans.CHANNEL_LANES == 0 and plan.threads <= plans.MOST_THREADS
        assert plan.shared_bytes(states, True) <= gpu.shared
        plan = plans.backward(sequences, channels, states, gpu)
        assert isinstance(plan, plans.StepLanes) or plan.shared_bytes(True) <= gpu.shared


@pytest.mark.parametrize("length, steps", [(1, 1), (8, 1), (9, 2), (17, 4), (33, 8), (64, 8), (197, 1), (6085, 8)])
def test_last_chunk(length, steps):
    assert plans.tail(length) == steps

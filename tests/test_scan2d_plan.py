"""How the CUDA C++ fused 2D scan of several states shares out its work, on an H200 if nothing else is said."""

import pytest

from vmamba.kernels import scan2d_cuda
from vmamba.kernels import scan2d_plan as plans
from vmamba.kernels.gpu import GPU
from vmamba.kernels.scan2d_segments import Scan

SHARED = 99 * 1024  # bytes that a block may have on any GPU from compute capability 8.0 on


@pytest.mark.parametrize(
    "sizes, plan",
    [
        ((8, 192, 16, 12, 4, 3136), (2, 8, 4, 1)),  # 384 blocks for 132 multiprocessors
        ((30, 192, 16, 6, 4, 6400), (4, 4, 4, 1)),  # Swin-UMamba's first stage in training
        ((30, 1536, 16, 48, 4, 100), (4, 4, 1, 1)),  # its last: blocks enough for one route after the other
        ((8, 384, 4, 24, 4, 196), (1, 4, 4, 1)),
        ((1, 96, 64, 6, 1, 196), (4, 16, 1, 1)),
        ((1, 192, 16, 12, 4, 4096), (4, 4, 4, 22)),  # VM-UNet's first stage, one image
        ((1, 192, 16, 12, 4, 196), (2, 8, 4, 1)),  # too short for segments
    ],
)
def test_forward(sizes, plan):
    assert plans.forward(Scan(*sizes), GPU(132, 227 * 1024)) == plan


@pytest.mark.parametrize("states", range(scan2d_cuda.SEVERAL, scan2d_cuda.MOST + 1))
def test_every_state_has_its_lane(states):
    possible = list(plans.possible(states))
    assert possible and len(set(possible)) == len(possible)
    for share, lanes in possible:
        plan = plans.Lanes(share, lanes)
        assert share * lanes >= states and plan.channels * lanes == plan.threads <= 256
        assert plan.channels % plans.EIGHT == 0
        assert all(plan.shared_bytes(states, rank) <= SHARED for rank in range(1, scan2d_cuda.MOST + 1))


@pytest.mark.parametrize("routes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("processors", [1, 20, 132])
def test_groups_share_the_routes_evenly(routes, processors):
    for samples, channels, length in (1, 8, 65536), (1, 192, 49), (8, 384, 4096), (128, 1536, 196):
        scan, gpu = Scan(samples, channels, 16, 12, routes, length), GPU(processors)
        plan = plans.forward(scan, gpu)
        assert routes % plan.groups == 0 and (plan.segments == 1 or plan.groups == routes)
        assert plan.time(scan, gpu) <= max(plans.Lanes(4, 4, groups).time(scan, gpu) for groups in {1, routes})

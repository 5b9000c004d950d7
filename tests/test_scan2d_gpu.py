"""The fused 2D scan on a CUDA GPU against the float64 reference: ``make test-gpu`` (``-s`` prints the table of errors).

Half precision rounds delta's projection besides the inputs (tf32 in the forward, the inputs' type in the backward, as a
linear layer under autocast does): its bounds are those of the rounding.
"""

import pytest
import torch

import vmamba
from vmamba.kernels import scan2d_backward_plan as backward_plans
from vmamba.kernels import scan2d_cuda, scan2d_reference, scan2d_triton
from vmamba.kernels import scan2d_plan as plans
from vmamba.kernels import scan2d_segments as segments
from vmamba.kernels.scan2d import scan2d
from vmamba.scans import Scan

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 3e-3), torch.bfloat16: (1e-3, 8e-3)}
BACKENDS = [(scan2d_triton, dtype) for dtype in BOUNDS] + [(scan2d_cuda, dtype) for dtype in scan2d_cuda.TYPES]
CASES = [  # batch, grid, d, r, n, scan
    (2, (7, 9), 96, 6, 1, "cross"),
    (3, (1, 1), 33, 3, 4, "cross"),
    (64, (14, 14), 160, 10, 1, "cross"),
    (2, (14, 14), 40, 5, 4, "bidirectional"),
    (1, (23, 31), 33, 3, 16, "raster"),
    (1, (8, 8), 64, 48, 64, "cross"),
    (5, (17, 33), 96, 12, 1, "cross"),
    (2, (9, 16), 130, 64, 1, "cross"),
    (2, (13, 11), 192, 12, 16, "atrous"),
    (3, (20, 20), 384, 24, 16, "cross"),
    (2, (8, 8), 40, 1, 5, "atrous"),
    (4, (10, 10), 1536, 48, 16, "cross"),
]
SEGMENTED = [
    (2, (16, 17), 40, 6, 1, "cross"),
    (1, (23, 29), 96, 12, 16, "cross"),
    (2, (13, 15), 24, 5, 4, "bidirectional"),
    (2, (13, 13), 16, 3, 2, "atrous"),
    (1, (15, 15), 16, 48, 64, "raster"),
    (1, (14, 14), 40, 20, 24, "cross"),
]
PLANS = [(r, n, sizes) for r, n in [(5, 4), (6, 5), (12, 16), (48, 20), (64, 64)] for sizes in plans.possible(n)]


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def inputs(case, dtype):
    b, grid, d, r, n, scan = case
    table = Scan(scan).table(*grid, "cuda")
    k, p = len(table.routes), grid[0] * grid[1]
    generator = torch.Generator("cuda").manual_seed(d)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=generator)

    x, projected = normal(b, p, d).to(dtype), normal(b, p, k, r + 2 * n).to(dtype)
    return [x, projected, normal(k, d, r) * r**-0.5, -normal(k, d, n).exp(), normal(k, d), normal(k, d) - 2], table


@pytest.mark.parametrize("backend, dtype", BACKENDS, ids=lambda t: str(getattr(t, "__name__", t)).split(".")[-1])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("programs", [1, 1 << 20], ids=["routes in turn", "routes apart"])
def test_values_and_gradients(case, backend, dtype, programs, monkeypatch):
    if backend is scan2d_cuda:  # channels in multiples of 8
        case = (*case[:2], -(-case[2] // 8) * 8, *case[3:])
        groups = 1 if programs == 1 else len(Scan(case[5]).table(*case[1], "cuda").routes)
        chosen = scan2d_cuda._plan
        monkeypatch.setattr(scan2d_cuda, "_plan", lambda *sizes: chosen(*sizes)._replace(groups=groups))
        monkeypatch.setattr(scan2d_cuda, "_grid", scan2d_cuda._grid.__wrapped__)  # not what it found before
    monkeypatch.setattr(backend, "PROGRAMS", programs)
    monkeypatch.setattr(backend, "SHORT", 0, raising=False)
    assert backend.why_not(*inputs(case, dtype)[0]) is None
    tensors, table = inputs(case, dtype)
    exact = [t.double() for t in tensors]
    y, states = backend.forward(*tensors, *table[:2])
    right, right_states = scan2d_reference.forward(*exact, *table[:2])
    dy = torch.randn_like(y)
    got = backend.backward(dy, states, *table[:2], *tensors)
    again = backend.backward(dy, states, *table[:2], *tensors)
    expected = scan2d_reference.backward(dy.double(), right_states, *table[:2], *exact)
    pairs = zip((y, *got), (right, *expected), strict=True)
    figures = [float((one.double() - two).norm() / two.norm().clamp(min=1e-30)) for one, two in pairs]
    name = backend.__name__.split("_")[-1]
    print(f"\n| {name} | {case} | {str(dtype)[6:]} | " + " | ".join(f"{f:.0e}" for f in figures) + " |", end=" ")
    assert figures[0] < BOUNDS[dtype][0]
    assert max(figures[1:]) < BOUNDS[dtype][1]
    assert all(torch.equal(one, two) for one, two in zip(got, again, strict=True)), "not deterministic"


@pytest.mark.parametrize("dtype", scan2d_cuda.TYPES)
@pytest.mark.parametrize("scan", ["cross", "atrous"])
@pytest.mark.parametrize("r, n, sizes", PLANS, ids=str)
def test_every_plan_gives_the_same(r, n, sizes, scan, dtype, monkeypatch):
    monkeypatch.setattr(scan2d_cuda, "_plan", lambda *_: plans.Lanes(*sizes, groups=2))
    tensors, table = inputs((2, (13, 11), 40, r, n, scan), dtype)
    y, states = scan2d_cuda.forward(*tensors, *table[:2])
    exact = scan2d_reference.forward(*[t.double() for t in tensors], *table[:2])
    for got, right in zip((y, states), exact, strict=True):
        assert (got.double() - right).norm() <= 1e-3 * right.norm()
    assert torch.equal(scan2d_cuda.values(*tensors, *table[:2]), y)


@pytest.mark.parametrize("backend, dtype", BACKENDS, ids=lambda t: str(getattr(t, "__name__", t)).split(".")[-1])
@pytest.mark.parametrize("count", [2, 5, 50])
@pytest.mark.parametrize("case", SEGMENTED, ids=str)
def test_routes_in_segments(case, count, backend, dtype, monkeypatch):
    tensors, table = inputs(case, dtype)
    tensors[3], tensors[5] = tensors[3] / 10, tensors[5] - 2  # so that much of a state outlasts a segment

    def grid(_, scan, device):
        return scan.routes, scan.samples * -(-scan.channels // scan2d_cuda.CHANNELS), count

    def plan(scan, device):
        return plans.Lanes(*next(plans.possible(scan.states)), scan.routes, count)

    def spread(chosen, scan, gpu):
        return backward_plans.Blocks(scan.routes, -(-scan.channels // chosen.channels), 1, count)

    for name, forced in ("_grid", grid), ("_plan", plan), ("spread", spread):
        monkeypatch.setattr(scan2d_cuda, name, forced)
    monkeypatch.setattr(scan2d_triton, "_cuts", lambda *_: count)
    y, states = backend.forward(*tensors, *table[:2])
    exact = [t.double() for t in tensors]
    right, right_states = scan2d_reference.forward(*exact, *table[:2])
    dy = torch.randn_like(y)
    got = backend.backward(dy, states, *table[:2], *tensors)
    expected = scan2d_reference.backward(dy.double(), right_states, *table[:2], *exact)
    for one, two in zip((y, states), (right, right_states), strict=True):
        assert (one.double() - two).norm() <= BOUNDS[dtype][0] * two.norm()
    for one, two in zip(got, expected, strict=True):
        assert (one.double() - two).norm() <= BOUNDS[dtype][1] * two.norm()
    if backend is scan2d_cuda:
        assert torch.equal(backend.values(*tensors, *table[:2]), y)


@pytest.mark.parametrize("backend, dtype", [(scan2d_cuda, torch.bfloat16), (scan2d_triton, torch.float32)])
@pytest.mark.parametrize("states", [1, 16])
def test_one_large_image_is_cut_and_equals_itself_uncut(states, backend, dtype, monkeypatch):
    tensors, table = inputs((1, (96, 96), 96, 6, states, "cross"), dtype)
    planners = scan2d_cuda._grid, scan2d_cuda._plan, scan2d_cuda.spread

    def results():
        for planner in planners:
            planner.cache_clear()
        y, kept = backend.forward(*tensors, *table[:2])
        return y, *backend.backward(tensors[0].float(), kept, *table[:2], *tensors)

    cut = results()
    with monkeypatch.context() as uncut:
        uncut.setattr(segments, "counts", lambda *_: [1])
        whole = results()
    again = results()
    assert not torch.equal(cut[0], whole[0]), "it was not cut"
    for one, two, three in zip(cut, whole, again, strict=True):
        assert (one.float() - two.float()).norm() <= 1e-3 * two.float().norm()
        assert torch.equal(one, three)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logarithms_of_the_decay_give_the_same(case):
    case = (*case[:2], -(-case[2] // 8) * 8, *case[3:])
    tensors, table = inputs(case, torch.bfloat16)
    learned = [t.detach().requires_grad_() for t in (*tensors[:3], (-tensors[3]).log(), *tensors[4:])]
    x, projected, dt_proj, logs, *rest = learned
    y = scan2d(*learned, table, log_A=True)
    expected = scan2d(x, projected, dt_proj, -logs.exp(), *rest, table)
    dy = torch.randn_like(y)
    pairs = zip(
        (y, *torch.autograd.grad(y, learned, dy)), (expected, *torch.autograd.grad(expected, learned, dy)), strict=True
    )
    assert max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs) < 1e-5


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vanilla_vmamba_tiny", "vmamba_tiny_m2"])
def test_a_network_equals_itself_on_the_cpu(name):
    torch.manual_seed(0)
    model, image = vmamba.create_model(name, depths=(1, 1, 1, 1), dim=32).eval(), torch.randn(2, 3, 72, 50)
    with torch.no_grad():
        cpu, gpu = model(image), model.cuda()(image.cuda()).cpu()
    assert (cpu - gpu).norm() < 1e-4 * cpu.norm()

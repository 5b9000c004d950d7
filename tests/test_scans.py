"""Every scan in the folder: its table, splitting and merging as transposes, and the orders that papers publish."""

import itertools

import pytest
import torch

from tests import goldens
from vmamba.kernels.routes import table_of
from vmamba.scans import Scan, list_scans

GRIDS = [(1, 1), (1, 7), (5, 3), (8, 8), (7, 6)]
PUBLISHED = {"cross2d": "cross", "unidi": "unidi", "bidi": "bidi", "rot2d": "rot2d"}


@pytest.mark.parametrize("name", [*list_scans(), "local(window=3)", "local(window=20)", "shuffle(seed=1)"])
@pytest.mark.parametrize("grid", GRIDS)
class TestEveryScan:
    def test_table(self, name, grid):
        h, w = grid
        routes, inverse, padded, once, straight = Scan(name).table(h, w)
        assert not padded or (routes == h * w).any()
        assert straight == (routes.tolist() == [list(range(h * w))])
        assert once == all(len(set(r)) == len(r) for r in ([p for p in row if p < h * w] for row in routes.tolist()))
        assert routes.shape[0] == Scan(name).count and routes.ndim == 2
        assert routes.min() >= 0 and routes.max() <= h * w
        visits = torch.bincount(routes.flatten(), minlength=h * w + 1)[: h * w]
        assert (visits == visits[0]).all() and visits[0] > 0, "every pixel must be visited equally often"
        assert inverse.shape == (visits[0], h * w)
        assert (routes.flatten()[inverse] == torch.arange(h * w)).all()

    def test_merge_is_the_transpose_of_split(self, name, grid):
        scan = Scan(name)
        x = torch.randn(2, *grid, 3, dtype=torch.float64)
        split = scan.split(x)
        y = torch.randn_like(split)
        assert torch.allclose((split * y).sum(), (x * scan.merge(y, *grid)).sum())
        visits = scan.table(*grid).inverse.shape[0]
        assert torch.allclose(scan.merge(split, *grid), visits * x)

    def test_gradients(self, name, grid):
        scan = Scan(name)
        x = torch.randn(1, *grid, 2, dtype=torch.float64, requires_grad=True)
        weight = torch.randn_like(scan.split(x))
        (grad,) = torch.autograd.grad((scan.split(x) * weight).sum(), x)
        assert torch.equal(grad, scan.merge(weight, *grid))
        if x.numel() < 40:  # finite differences take long
            assert torch.autograd.gradcheck(lambda x: scan.merge(scan.split(x) * weight, *grid), x)

    def test_each_route_reads_its_slot(self, name, grid):
        scan = Scan(name)
        x = torch.randn(2, *grid, scan.count, 3, requires_grad=True)
        each = scan.split_each(x)
        for k in range(scan.count):
            assert torch.equal(each[:, k], scan.split(x[..., k, :])[:, k])
        each.square().sum().backward()
        visits = [torch.bincount(route, minlength=grid[0] * grid[1] + 1)[:-1] for route in scan.routes(*grid)]
        assert torch.allclose(x.grad, 2 * x * torch.stack(visits, -1).view(*grid, scan.count, 1))


@pytest.mark.parametrize("key", [k for k in goldens.load("ss2d_modes")["routes"] if k.rsplit("_", 1)[0] in PUBLISHED])
def test_published_order(key):
    mode, size = key.rsplit("_", 1)
    h, w = map(int, size.split("x"))
    golden = goldens.load("ss2d_modes")["routes"][key]
    scan = Scan(PUBLISHED[mode])
    assert scan.routes(h, w).tolist() == golden["scan"]
    numbers = torch.arange(4.0 * h * w).view(1, 4, h * w, 1)
    assert scan.merge(numbers, h, w).flatten().tolist() == golden["merge_of_arange"]


@pytest.mark.parametrize("case", goldens.load("op_cross_scan")["cases"], ids=lambda case: case["what"])
def test_cross_scan_golden(case):
    options = case["options"]
    scan = Scan({0: "cross", 1: "unidi", 2: "bidi"}[options.get("scans", 0)])
    x = goldens.named_inputs(case)["x"].requires_grad_()
    first_in, first_out = options.get("in_channel_first", True), options.get("out_channel_first", True)
    each, merging = options.get("one_by_one", False), case["what"].startswith("merge")
    y = channels_last(x, first_in)  # (b, h, w, [k,] c)
    h, w = y.shape[1:3]
    if not merging:
        routes = scan.split_each(y) if each else scan.split(y)  # (b, k, l, c)
        out = routes.transpose(2, 3) if first_out else routes.transpose(1, 2)
    else:
        y = y.flatten(1, 2).transpose(1, 2)  # (b, k, l, c): each route in its own order
        out = merge_each(scan, y, h, w) if each else scan.merge(y, h, w).flatten(1, 2)
        out = out.mT if first_out else out
    assert goldens.compare(out, case["outputs"]["out"]) < 1e-12
    if "grad" in case:
        upstream = torch.from_numpy(goldens.make_input(out.shape, case["grad"]["seed"]))
        (grad,) = torch.autograd.grad(out, x, upstream)
        assert goldens.compare(grad, case["outputs"]["dx"]) < 1e-12


def channels_last(x, channels_first):
    if not channels_first:
        return x
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x.permute(0, 3, 4, 1, 2)


def merge_each(scan, y, h, w):
    """(b, k, l, c) -> (b, k, h * w, c): each route back in place, not summed."""
    alone = [Scan(lambda h, w, k=k: scan.routes(h, w)[k : k + 1]) for k in range(scan.count)]
    return torch.stack([one.merge(y[:, k : k + 1], h, w).flatten(1, 2) for k, one in enumerate(alone)], 1)


@pytest.mark.parametrize(("h", "w"), [*itertools.product(range(1, 10), repeat=2), (17, 40), (28, 13)])
def test_hilbert_goes_from_neighbour_to_neighbour(h, w):
    routes = Scan("hilbert").routes(h, w)
    y, x = routes // w, routes % w
    dy, dx = y.diff().abs(), x.diff().abs()
    assert (torch.maximum(dy, dx) == 1).all()
    assert routes[:2, 0].tolist() == [0, 0]
    assert torch.equal(routes[2:], routes[:2].flip(1))
    for route, diagonals, along, across in zip(routes, (dy + dx - 1).sum(1), (w, h), (h, w), strict=False):
        breaks = along % 2 > across % 2  # no path from neighbour to neighbour joins these corners through all pixels
        assert diagonals == (breaks and along > 1 and across > 2)
        if across > 2 or not breaks:
            assert route[-1] in (w - 1, (h - 1) * w)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_hilbert_of_a_power_of_two_is_hilberts_curve(n):
    """Each quarter of the curve lies in one quarter of the square, down to single pixels."""
    side = 2**n
    for route in Scan("hilbert").routes(side, side):
        for level in range(n):
            small = side >> level
            quarter = (route // side // small) * (1 << level) + route % side // small
            assert (quarter.view(4**level, -1) == quarter.view(4**level, -1)[:, :1]).all()


@pytest.mark.parametrize(
    ("scan", "grid", "routes"),
    [
        ("local", (3, 3), [[0, 1, 3, 4, 2, 5, 6, 7, 8], [0, 3, 1, 4, 6, 7, 2, 5, 8]]),
        ("local(window=3)", (2, 4), [[0, 1, 2, 4, 5, 6, 3, 7], [0, 4, 1, 5, 2, 6, 3, 7]]),
        ("wavelet", (4, 4), [[0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]]),
        ("wavelet", (3, 5), [[0, 1, 2, 5, 6, 7, 3, 4, 8, 9, 10, 11, 12, 13, 14]]),
        ("hilbert", (2, 2), [[0, 2, 3, 1], [0, 1, 3, 2]]),
        ("shuffle", (2, 3), [[5, 2, 1, 3, 0, 4]]),  # weights depend on it: it may never change
        ("shuffle(seed=1)", (1, 5), [[2, 1, 4, 0, 3]]),
    ],
)
def test_first_routes_and_the_same_backwards(scan, grid, routes):
    got = Scan(scan).routes(*grid)
    assert got[: len(routes)].tolist() == routes
    assert torch.equal(got[got.shape[0] // 2 :], got[: got.shape[0] // 2].flip(1))


def test_padding_reads_zero_and_unequal_visits_are_summed():
    routes = torch.tensor([[0, 4, 2], [2, 4, 4]])  # pixel 2 twice, pixels 1 and 3 never, 4 stands for a zero
    scan = Scan(lambda h, w: routes)
    x = torch.arange(1.0, 5.0).view(1, 2, 2, 1).requires_grad_()
    y = scan.split(x)
    assert y.flatten().tolist() == [1, 0, 3, 3, 0, 0]
    assert scan.merge(torch.ones_like(y), 2, 2).flatten().tolist() == [1, 0, 2, 0]
    y.sum().backward()
    assert x.grad.flatten().tolist() == [1, 0, 2, 0]


def test_half_precision_is_summed_in_float32():
    y = torch.full((1, 4, 1, 1), 60000.0, dtype=torch.float16)
    assert (
        Scan("cross").merge(
            y[:, :1].expand(-1, 4, -1, -1) * torch.tensor([1.0, -1, 1, -1]).half()[None, :, None, None], 1, 1
        )
        == 0
    )


def test_table_out_of_range():
    with pytest.raises(ValueError, match="from 0 to 4"):
        table_of(torch.tensor([[0, 5]]), 4)


def test_compiles_and_exports():
    scan = Scan("cross")

    def merged(x):
        return scan.merge(scan.split(x), *x.shape[1:3])

    compiled = torch.compile(merged, fullgraph=True)
    for grid in [(3, 5), (4, 5), (5, 6)]:
        x = torch.randn(2, *grid, 4)
        assert torch.allclose(compiled(x), 4 * x)

    class Module(torch.nn.Module):
        def forward(self, x):
            return merged(x)

    x = torch.randn(2, 3, 5, 4)
    assert torch.allclose(torch.export.export(Module(), (x,)).module()(x), 4 * x)
    assert merged(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("name", list_scans())
def test_every_scan_compiles(name):
    scan, x = Scan(name), torch.randn(1, 3, 5, 2)

    def both(x):
        return scan.split(x), scan.merge(scan.split(x), *x.shape[1:3])

    for got, expected in zip(torch.compile(both, fullgraph=True, backend="eager")(x), both(x), strict=True):
        assert torch.equal(got, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("op", ["route_gather", "route_merge"])
def test_operators_are_registered_properly(op):
    table = Scan("cross").table(2, 3)
    shape = (2, 6, 3) if op == "route_gather" else (2, 4, 6, 3)
    torch.library.opcheck(getattr(torch.ops.vmamba, op), (torch.randn(shape, requires_grad=True), *table[:3]))

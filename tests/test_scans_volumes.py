"""Scans of volumes: the same tables as for maps, over three sides."""

import pytest
import torch

from vmamba.mixers.bimamba import BiMamba
from vmamba.scans import Scan, list_scans

ANY = [name for name in list_scans() if Scan(name).sides is None]
GRIDS = [(1, 1, 1), (1, 5, 1), (2, 3, 4), (3, 2, 5)]


def spread_out(d, h, w):
    """(1, d * h * w), of volumes alone: column by column through the slices."""
    return torch.arange(d * h * w).view(d, h, w).permute(2, 1, 0).reshape(1, -1)


def test_some_scans_read_any_grid():
    assert {"raster", "bidirectional", "serpentine"} <= set(ANY)


@pytest.mark.parametrize("scan", [*ANY, spread_out])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_route_visits_every_voxel_once(scan, grid):
    scan = Scan(scan)
    routes, _, padded, once, straight = scan.grid_table(grid)
    assert routes.shape[0] == scan.count and once and not padded
    assert straight == (routes.tolist() == [list(range(routes.shape[1]))])
    assert (routes.sort(1).values == torch.arange(routes.shape[1])).all()


@pytest.mark.parametrize("scan", [*ANY, spread_out])
def test_merge_is_the_transpose_of_split(scan):
    scan, grid = Scan(scan), (2, 3, 4)
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    y = torch.randn(2, scan.count, 24, 3, dtype=torch.float64)
    assert torch.allclose((scan.split(x) * y).sum(), (x * scan.merge(y, *grid)).sum())
    each = torch.randn(2, *grid, scan.count, 3)
    for k in range(scan.count):
        assert torch.equal(scan.split_each(each)[:, k], scan.split(each[..., k, :])[:, k])


@pytest.mark.parametrize("name", ANY)
def test_a_slice_is_read_as_the_map_that_it_is(name):
    assert torch.equal(Scan(name).routes(1, 3, 4), Scan(name).routes(3, 4))


def test_every_step_of_a_snake_goes_to_a_neighbour():
    for route in Scan("serpentine").routes(3, 4, 5):
        place = torch.stack(torch.unravel_index(route, (3, 4, 5)), 1)
        assert (place.diff(dim=0).abs().sum(1) == 1).all()


def test_scans_of_maps_refuse_volumes():
    with pytest.raises(ValueError, match=r"'hilbert' reads grids of 2 sides, got \(2, 3, 4\); raster, bidirectional"):
        Scan("hilbert").split(torch.zeros(1, 2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"reads grids of 3 sides, got \(2, 3\)"):
        Scan(spread_out).table(2, 3)


@pytest.mark.parametrize("scan", [*ANY, spread_out])
def test_mamba_mixes_volumes(scan):
    torch.manual_seed(0)
    mixer = BiMamba(8, state=2, scan=scan)
    x = torch.randn(2, 2, 3, 4, 8)
    y = mixer(x)
    assert y.shape == x.shape
    scan = mixer.scan
    lines = BiMamba(8, state=2, scan=lambda h, w: scan.routes(2, 3, 4))
    lines.load_state_dict(mixer.state_dict())
    assert torch.allclose(lines(x.flatten(1, 3)[:, None]), y.flatten(1, 3)[:, None], atol=1e-6)
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), y, atol=1e-6)
    torch.compiler.reset()

"""What a scan is called, and that it is found by its name: parameters, tables, pickles, compiled and exported code."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch

from vmamba.mixers.ss2d import SS2D
from vmamba.scans import Scan, cross, find_routes, list_scans, local, shuffle


def columns(h, w):
    """Column by column."""
    return torch.arange(h * w).view(h, w).T.reshape(1, -1)


class Turned:
    """A scan with settings, as an object."""

    def __call__(self, h, w):
        return columns(h, w).flip(1)


NAMED = {
    "cross": "cross",
    "vmamba.scans.cross": "cross",
    cross: "cross",
    cross.routes: "cross",
    "local(window=3)": "local(window=3)",
    "vmamba.scans.local( window = 3 )": "local(window=3)",
    partial(local.routes, window=3): "local(window=3)",
    partial(partial(shuffle.routes), seed=5): "shuffle(seed=5)",
    columns: f"{__name__}.columns",
    f"{__name__}.columns": f"{__name__}.columns",
}
UNNAMED = {
    "lambda": lambda h, w: columns(h, w),
    "object": Turned(),
    "partial with a place": partial(lambda turn, h, w: columns(h, w).flip(turn), 1),
    "partial of a tensor": partial(lambda h, w, order: columns(h, w), order=torch.arange(3)),
}


@pytest.mark.parametrize(("scan", "name"), NAMED.items(), ids=range(len(NAMED)))
def test_name(scan, name):
    made = Scan(scan)
    assert made.name == name and repr(made) == f"Scan({name!r})"
    assert Scan(name).table(3, 4).routes is made.table(3, 4).routes
    assert torch.equal(find_routes(name)(3, 4), made.routes(3, 4))
    assert Scan(made).name == name


@pytest.mark.parametrize("name", list_scans())
def test_every_scan_is_called_as_its_file(name):
    assert Scan(find_routes(name)).name == name


@pytest.mark.parametrize("kind", UNNAMED)
def test_functions_without_a_name_keep_tables_of_their_own(kind):
    one, other = Scan(UNNAMED[kind]), Scan(lambda h, w: torch.arange(h * w)[None])
    assert not torch.equal(one.table(2, 3).routes, other.table(2, 3).routes)
    assert Scan(UNNAMED[kind]).table(2, 3).routes is one.table(2, 3).routes
    again = copy.deepcopy(one)
    assert torch.equal(again.table(2, 3).routes, one.table(2, 3).routes)


def test_parameters_have_tables_of_their_own():
    tables = [Scan(scan).table(4, 6).routes for scan in ("local", "local(window=3)", partial(local.routes, window=4))]
    assert len({tuple(table.flatten().tolist()) for table in tables}) == 3


def test_a_function_defined_anew_is_another_scan(monkeypatch):
    before = Scan(columns)
    assert before.table(2, 3).routes.tolist() == [[0, 3, 1, 4, 2, 5]]
    code = "def columns(h, w):\n    return torch.arange(h * w).flip(0)[None]"
    replaced = {"torch": torch, "__name__": __name__}
    exec(code, replaced)
    monkeypatch.setattr(sys.modules[__name__], "columns", replaced["columns"])
    after = Scan(replaced["columns"])
    assert after.name == before.name
    assert after.table(2, 3).routes.tolist() == [[5, 4, 3, 2, 1, 0]]
    assert before.table(2, 3).routes.tolist() == [[0, 3, 1, 4, 2, 5]]


@pytest.mark.parametrize("scan", ["hilbert", partial(local.routes, window=3), columns])
def test_copies_and_pickles(scan):
    made = SS2D(8, scan=scan)
    x = torch.randn(1, 4, 5, 8)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again.scan.name == made.scan.name
        assert torch.equal(again(x), made(x))


def test_compiles_with_parameters():
    module = SS2D(8, state=1, scan=partial(local.routes, window=3))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for grid in ((3, 5), (4, 4)):
        x = torch.randn(1, *grid, 8)
        assert torch.allclose(compiled(x), module(x), atol=1e-6)


def elsewhere(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    return done.stdout, done.stderr


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user's module with a scan, in a folder from which another process runs too."""
    (tmp_path / "my_scans.py").write_text(
        "import torch\n\ndef back(h, w, turn=False):\n    return torch.arange(h * w).flip(int(not turn) - 1)[None]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(p for p in sys.path if p)}")
    yield tmp_path
    sys.modules.pop("my_scans", None)


def test_another_process_finds_a_users_scan(user):
    """By pickle; an exported program keeps its table, also of a scan that has no name."""
    import my_scans

    scans = {"my_scans.back": my_scans.back, "my_scans.back(turn=True)": partial(my_scans.back, turn=True)}
    modules = [SS2D(8, state=1, scan=scan).eval() for scan in (*scans.values(), lambda h, w: my_scans.back(h, w))]
    assert [module.scan.name for module in modules[:2]] == list(scans)
    x = torch.randn(1, 3, 4, 8)
    torch.save((x, [module(x) for module in modules]), user / "values.pt")
    torch.save(modules[:2], user / "modules.pt")
    for i, module in enumerate(modules):
        for strict in (True, False):
            torch.export.save(torch.export.export(module, (x,), strict=strict), user / f"{i}{strict}.pt2")
    printed, errors = elsewhere(
        "import torch, vmamba\n"
        "x, values = torch.load('values.pt')\n"
        "for module, y in zip(torch.load('modules.pt', weights_only=False), values):\n"
        "    print(torch.equal(module(x), y))\n"
        "load = lambda name: torch.export.load(name + '.pt2').module()(x)\n"
        "for name in ('0True', '1True', '2True', '0False', '1False', '2False'):\n"
        "    print(torch.allclose(load(name), values[int(name[0])], atol=1e-6))\n",
        user,
    )
    assert printed.splitlines() == ["True"] * 8, errors


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        ("cros", "unknown scan 'cros' .did you mean 'cross'.*hilbert"),
        ("locl(window=3)", "did you mean 'local'"),
        ("local(windw=3)", "unexpected keyword argument 'windw'; it takes .*window: int = 2"),
        ("local(3)", "must read name or name.parameter=value."),
        ("local(window=os)", "must read name or name.parameter=value."),
        ("two words", "must read name or name.parameter=value."),
        ("json.decoder", "has no function routes"),
        ("no_such_package.scans", "cannot find scan 'no_such_package.scans': No module named 'no_such_package'"),
        (None, "a scan is a name, a function .* or a module with one, got None"),
        (lambda h, w: [0], r"must be an integer tensor \(k, l\), got \[0\]"),
        (lambda h, w: torch.arange(h * w), r"must be an integer tensor \(k, l\), got torch.int64 \(4,\)"),
        (lambda h, w: torch.zeros(1, h * w), r"got torch.float32 \(1, 4\)"),
    ],
)
def test_mistakes(scan, message):
    with pytest.raises(ValueError, match=message):
        Scan(scan)

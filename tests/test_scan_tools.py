"""vmamba scans: the list, the JSON, the picture, and its mistakes."""

import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from vmamba.scans import Scan, list_scans, local
from vmamba.tools.cli import main, parser
from vmamba.tools.draw_scans import COLOURS, draw
from vmamba.tools.scans import describe

DOCS = Path(__file__).parents[1] / "docs"


def test_list(capsys):
    assert main(["scans"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "parameters", "routes", "arXiv", "order"]
    assert [line.split()[0] for line in lines] == list_scans()
    (line,) = [line for line in lines if line.startswith("local ")]
    assert line.split()[1:4] == ["window=2", "4", "2403.09338"] and line.endswith("four routes.")


def test_json(capsys):
    assert main(["scans", "hilbert", "local(window=3)", "--json"]) == 0
    hilbert, window = json.loads(capsys.readouterr().out)
    assert hilbert["routes"] == 4 and hilbert["papers"] == ["2402.10739", "2405.14480"]
    assert window["name"] == "local(window=3)" and window["parameters"] == {"window": 3}


@pytest.mark.parametrize("name", list_scans())
def test_every_scan_says_what_it_does(name):
    facts = describe(Scan(name))
    assert facts["routes"] == Scan(name).count
    assert 20 < len(facts["order"]) < 150 and facts["order"].endswith(".") and "arXiv" not in facts["order"]


def test_a_users_scan(capsys, tmp_path, monkeypatch):
    text = (
        'from vmamba.scans.raster import routes as rows\n\n\ndef mine(h, w):\n    """Mine."""\n    return rows(h, w)\n'
    )
    (tmp_path / "scans_of_mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["scans", "scans_of_mine.mine"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["scans_of_mine.mine", "1", "Mine."]


def test_picture(capsys, tmp_path):
    path = tmp_path / "scans.png"
    assert main(["scans", "cross", "hilbert", "--plot", str(path), "--grid", "5x7"]) == 0
    assert str(path) in capsys.readouterr().out
    picture = imread(path)
    assert picture.shape[1] > 800 and path.stat().st_size < 200_000
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (5, 3)])
def test_panels(grid):
    h, w = grid
    scans = [Scan(scan) for scan in ("cross", "atrous", "chained", "shuffle", local)]
    panels = draw(scans, *grid).axes[:-1]  # the last one is the legend
    assert len(panels) == sum(scan.count for scan in scans)
    assert [panel.get_title("left") for panel in panels if panel.get_title("left")] == [scan.name for scan in scans]
    routes = [route for scan in scans for route in scan.routes(h, w).tolist()]
    for panel, route in zip(panels, routes, strict=True):
        real = [a < h * w and b < h * w for a, b in itertools.pairwise(route)]
        drawn = sum(len(collection.get_offsets()) for collection in panel.collections)
        assert drawn == sum(pixel < h * w for pixel in route) + sum(real)


def test_arrows_lead_from_step_to_step():
    panel = draw([Scan("serpentine")], 3, 4).axes[0]
    _, jumps, steps = panel.collections
    assert len(jumps.get_offsets()) == 0
    route = Scan("serpentine").routes(3, 4)[0].numpy()
    start, end = route[:-1], route[1:]
    assert np.array_equal(steps.get_offsets(), np.stack([start % 4, start // 4], 1))
    assert np.array_equal(steps.U, end % 4 - start % 4) and np.array_equal(steps.V, end // 4 - start // 4)
    assert np.allclose(steps.get_facecolor(), COLOURS(np.linspace(0, 1, 12))[:-1])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("scans hilbrt", "did you mean 'hilbert'"),
        ("scans 'local(3)'", "name(parameter=value)"),
        ("scans --plot scans.jpg", "must end in .png, got 'scans.jpg'"),
        ("scans --plot nowhere/scans.png", "no folder 'nowhere'"),
        ("scans --plot scans.png --grid 0x4", "such as 6x8, got '0x4'"),
        ("scans --plot scans.png --grid 6", "such as 6x8, got '6'"),
        ("scans --plot scans.png --grid 600x600", "at most 1024 pixels"),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vmamba: error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_page():
    text = (DOCS / "scans.md").read_text()
    (code,), (commands,) = (re.findall(rf"```{language}\n(.*?)```", text, re.S) for language in ("python", "sh"))
    exec(compile(code, "docs/scans.md", "exec"), {})
    for command in [line.split("  #")[0] for line in commands.splitlines()]:
        assert callable(parser().parse_args(shlex.split(command)[1:]).run)


def test_the_page_shows_every_scan():
    command = "make it again by vmamba scans --plot docs/scans.png"
    assert Image.open(DOCS / "scans.png").info["Description"] == ", ".join(list_scans()), command
    assert (DOCS / "scans.png").stat().st_size < 150_000


def test_without_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "vmamba.tools.draw_scans")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["scans", "--plot", str(tmp_path / "scans.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "matplotlib" in line and "pip install 'vmamba[medical]'" in line

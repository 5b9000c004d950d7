"""The README's programme runs, its tables say what the zoo and the measurements say, and its commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from tests import goldens
from vmamba.registry import entries
from vmamba.tools.cli import parser
from vmamba.tools.info import describe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def rows(text):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines]


def section(text, title):
    (found,) = re.findall(rf"^#+ {re.escape(title)}.*?\n(.*?)(?=^#|\Z)", text, re.S | re.M)
    return found


NETWORKS = [row for row in rows(section(README, "Networks")) if row[0].startswith("`")]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_programme():
    (code,) = blocks("python")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 10)
    assert [tuple(m.shape) for m in names["maps"]] == [(1, 192, 28, 28), (1, 768, 7, 7)]
    assert names["y"].shape == (1, 14, 14, 96)


def test_table_has_every_network():
    assert sorted(row[0].strip("`") for row in NETWORKS) == sorted(entries())


@pytest.mark.parametrize("row", NETWORKS, ids=lambda row: row[0].strip("`"))
def test_row(row):
    name, _, parameters, multiply_adds, top1, weights = row
    name = name.strip("`")
    entry = entries()[name]
    facts = describe(name, list(entry.sides or [224]))
    assert float(parameters.split(" ")[0]) == pytest.approx(facts["parameters"] / 1e6, abs=0.05)
    assert float(multiply_adds.split(" ")[0]) == pytest.approx(facts["multiply_adds"] / 1e9, abs=0.005)
    assert weights.startswith("download") == (entry.weights is not None)
    if entry.weights:
        assert float(top1) == entry.weights.top1
    if name in goldens.names():
        paper = goldens.load(name).get("paper", {})
        published = paper.get("imagenet1k_top1", paper.get("top1"))
        assert published is None or top1 == str(published)


def test_ratios_are_those_of_the_measurements():
    quoted = re.search(r"Bot 3D takes ([\d.]+) of the time .* of VM-UNet ([\d.]+)\)", README.replace("\n", " "))
    measured = (ROOT / "docs/medical.md").read_text()
    assert quoted and f"U-Mamba Bot 17.3 ({quoted[1]};" in measured and f"VM-UNet 24.5 ({quoted[2]};" in measured


def test_speeds_are_those_of_the_measurements():
    measured = section((ROOT / "docs/performance.md").read_text(), "Networks on a GPU")
    _, *speeds = rows(section(README, "Speed"))
    assert len(speeds) == 4
    first = {row[0]: row[1:3] for row in reversed(rows(measured))}  # the first table that has the network
    for name, inference, training, compiled in speeds:
        if name in first:
            assert [inference, training] == first[name]
        else:
            assert f"{inference} and {training} img/s" in measured
        assert compiled == "-" or f"{compiled} without" in measured


def test_commands():
    lines = [
        line.split("  #")[0] for block in blocks("sh") for line in block.splitlines() if line.startswith("vmamba ")
    ]
    assert len(lines) >= 7
    for line in lines:
        assert callable(parser().parse_args(shlex.split(line)[1:]).run)

"""What ``vmamba benchmark models`` measured as a picture: throughput and peak memory over the size of images.

Throughput is in pixels per second: images per second fall with the square of the size for every network alike, which
would hide what tells them apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from vmamba import list_models
from vmamba.benchmark import OOM, Row

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito
MARKERS = "osD^vP*X"
INK, GRID = "#333333", "#e4e4e4"


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Draw the results of ``vmamba benchmark models`` into a PNG."""
    setting = ", ".join(f"{key}: {value}" for key, value in results["setting"].items())
    description = f"{results['machine']['device']}; {results['machine']['versions']}; {setting}"
    draw(results).savefig(path, dpi=150, metadata={"Description": description})


def draw(results: Mapping[str, Any]) -> Figure:
    """A row of two panels for each task: images per second, and peak memory, both over the side of the images."""
    rows: Sequence[Row] = results["rows"]
    tasks, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "name"))
    batches = {row["batch"] for row in rows}
    same = len(batches) == 1
    share = f"of a batch of {max(batches)}" if same else "per image"
    figure = Figure(figsize=(10.5, 1.5 + 3.4 * len(tasks)), layout="constrained")
    looks = {name: _look(i, name) for i, name in enumerate(names)}
    panels: Any = figure.subplots(len(tasks), 2, squeeze=False)
    for (left, right), task in zip(panels, tasks, strict=True):
        of_task = [row for row in rows if row["task"] == task]
        _panel(left, of_task, looks, lambda row: row["batch"] * row["size"] ** 2 / row["ms"] / 1e3, 0)
        known = [row for row in of_task if row["failure"] or row["peak_bytes"] is not None]
        _panel(right, known, looks, lambda row: row["peak_bytes"] / 2**30 / (1 if same else row["batch"]), 1)
        left.set_title(f"{task}, million pixels per second", loc="left", fontsize=11, color=INK)
        right.set_title(f"{task}, peak memory {share}, GiB", loc="left", fontsize=11, color=INK)
    for axes in panels[-1]:
        axes.set_xlabel("height and width of the images", color=INK)
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    if any(row["failure"] == OOM for row in rows):
        handles.append(Line2D([], [], label="out of memory", color=INK, marker="x", linestyle="none"))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 4), frameon=False, fontsize=9)
    figure.supxlabel(_caption(results), x=0.01, ha="left", fontsize=8, color="#666666")
    return figure


def _look(index: int, name: str) -> dict[str, Any]:
    """Ours are drawn thick and whole, others thin and dashed."""
    ours = name.removesuffix("_backbone") in list_models()
    line: dict[str, Any] = {"linewidth": 2.4, "linestyle": "-"} if ours else {"linewidth": 1.4, "linestyle": "--"}
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5, **line}


def _panel(axes: Axes, rows: Sequence[Row], looks: Mapping[str, Mapping[str, Any]], value: Any, edge: int) -> None:
    """``edge`` 0 or 1: crosses for what had not enough memory stand below or above the lines, a row per network."""
    lost: dict[str, list[int]] = {}
    axes.set(xscale="log", yscale="log")
    for name, look in looks.items():
        mine = sorted((row for row in rows if row["name"] == name), key=lambda row: row["size"])
        points = [(row["size"], value(row)) for row in mine if row["failure"] is None]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), **look)
        if any(row["failure"] == OOM for row in mine):
            lost[name] = [row["size"] for row in mine if row["failure"] == OOM]
    _axes(axes, sorted({row["size"] for row in rows}))
    low, high = axes.get_ylim()
    strip = (high / low) ** (0.07 * len(lost))
    axes.set_ylim(low if edge else low / strip, high * strip if edge else high)
    for index, (name, sizes) in enumerate(lost.items()):
        height = abs(edge - (0.03 + 0.06 * index))
        look = {"color": looks[name]["color"], "markersize": 7, "transform": axes.get_xaxis_transform()}
        axes.plot(sizes, [height] * len(sizes), "x", **look)


def _axes(axes: Axes, sizes: Sequence[int]) -> None:
    low, high = axes.get_ylim()
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 8 else MaxNLocator(6))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def _caption(results: Mapping[str, Any]) -> str:
    machine, setting = results["machine"], results["setting"]
    facts = setting["precision"], f"TF32 {setting['TF32']}", setting["layout"], setting["mode"]
    return "\n".join((machine["device"], fill(machine["versions"], 150), "; ".join(facts), f"batch {setting['batch']}"))

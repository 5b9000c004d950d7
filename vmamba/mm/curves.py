"""Losses and metrics of runs of mmengine, from the files that it writes beside its logs; and a picture of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vmamba.errors import UserError

SCALARS = "*/vis_data/scalars.json"  # in a work folder; one file for each start of the run
SHOWN = ("bbox_mAP_50", "segm_mAP_50", "bbox_mAP", "segm_mAP", "mIoU", "mAcc", "aAcc", "top1", "top5")
CLOCKS = ("time", "data_time", "memory", "iter", "epoch", "step")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito
STYLES = ("-", "--", ":", "-.")

Rows = dict[int, dict[str, float]]  # iteration (in validation by epochs: epoch) -> name -> value


@dataclass
class Run:
    """What a run logged: of the training (losses, learning rates) and of the validations (metrics)."""

    name: str
    train: Rows = field(default_factory=dict)
    val: Rows = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, those of ``SHOWN`` first and in its order."""
        names = dict.fromkeys(name for row in self.val.values() for name in row if name not in CLOCKS)
        known = [name for last in SHOWN for name in names if name.split("/")[-1] == last]
        return tuple(known) or tuple(names)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: columns of the training and of the validations, and the metrics of the last one."""
        last = self.val[max(self.val)] if self.val else {}
        final = {name: last[name] for name in self.metrics if name in last}
        return {"train": _columns(self.train), "val": _columns(self.val), "final": final}


def read_run(folder: Path) -> Run:
    """The run of a work folder. Where a run was resumed, what was trained twice counts once, as resumed.

    Raises:
        UserError: there is nothing in it, or a file is damaged (a half-written last line is left out).
    """
    files = sorted(folder.glob(SCALARS))
    run = Run(folder.resolve().name)
    for file in files:
        train, val = _read(file)
        for rows, more in ((run.train, train), (run.val, val)):
            for step in [step for step in rows if train and step >= min(train)]:
                del rows[step]
            rows.update(more)
    if not run.train:
        raise UserError(f"{folder}: no logs of a training ({SCALARS}); give the --work-dir of vmamba train")
    return run


def _read(file: Path) -> tuple[Rows, Rows]:
    train: Rows = {}
    val: Rows = {}
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{file}: line {number} is damaged ({error})") from error
        (train if "loss" in row else val)[int(row["step"])] = row
    return train, val


def _columns(rows: Rows) -> dict[str, list]:
    names = dict.fromkeys(name for row in rows.values() for name in row)
    columns = {name: [row.get(name) for row in rows.values()] for name in names if name != "step"}
    return {"step": list(rows), **columns}


def draw(runs: Sequence[Run]) -> Figure:
    """A row for each kind of run, by its metrics: the loss on the left, the metrics on the right."""
    kinds: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.metrics, []).append(run)
    figure = Figure(figsize=(10, 0.4 + 3.2 * len(kinds)), layout="constrained")
    panels: Any = figure.subplots(len(kinds), 2, squeeze=False)
    for (left, right), (metrics, group) in zip(panels, kinds.items(), strict=True):
        for colour, run in zip(COLOURS * len(group), group, strict=False):
            _line(left, run.train, "loss", run.name, color=colour)
        for style, run in zip(STYLES * len(group), group, strict=False):
            for colour, metric in zip(COLOURS * len(metrics), metrics, strict=False):
                label = metric if len(group) == 1 else f"{metric}, {run.name}"
                _line(right, run.val, metric, label, color=colour, linestyle=style, marker="o", markersize=3)
        left.set_ylim(0, None)
        left.set_title("training loss", loc="left", fontsize=11)
        right.set_title("validation", loc="left", fontsize=11)
        right.set_ylim(0, 1 if all(_most(run) <= 1 for run in group) else 100)
        for axes in (left, right):
            _dress(axes)
    return figure


def _line(axes: Axes, rows: Mapping[int, Mapping[str, float]], name: str, label: str, **look: Any) -> None:
    steps = [step for step, row in rows.items() if name in row]
    axes.plot(steps, [rows[step][name] for step in steps], label=label, **look)


def _most(run: Run) -> float:
    return max((row.get(name, 0) for row in run.val.values() for name in run.metrics), default=0)


def _dress(axes: Axes) -> None:
    axes.set_xlabel("iteration or epoch", fontsize=9)
    axes.set_xlim(0, None)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)

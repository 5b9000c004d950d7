"""Several networks on one data set in nnU-Net's layout: trained, tried and tabled by the commands that users type."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmamba.medical.model_folder import folder_name
from vmamba.medical.postprocess import FILE
from vmamba.medical.raw import RawDataset
from vmamba.medical.runs import read_json, write_json

PLANS = "nnUNetPlans"
Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A network or trainer in a configuration, and the options of its training."""

    network: str
    configuration: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.network}_{self.configuration}"


@dataclass(frozen=True)
class Comparison:
    """A preprocessed data set below ``root``, the folds to train, where to write, and the minutes that a network has.

    ``device`` is auto, cpu or gpu.
    """

    root: Path
    dataset: RawDataset
    folds: tuple[str, ...]
    output: Path
    device: str = "auto"
    minutes: float | None = None

    def life(self, entry: Entry) -> Row:
        """Trains the folds, predicts, post-processes and scores; a row with Dice and seconds, or with ``failure``."""
        row: Row = {"name": entry.name, "failure": None}
        log = self.output / f"{entry.name}.log"
        end = time.monotonic() + 60 * self.minutes if self.minutes else None
        try:
            for step in (self._train, self._predict, self._finish):
                step(entry, row, log, end)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            lines = log.read_text(encoding="utf-8").strip().splitlines()
            late = isinstance(error, subprocess.TimeoutExpired)
            row["failure"] = f"not done after {self.minutes:g} min" if late else lines[-1][:200]
        return row

    def ensemble(self, rows: Sequence[Row]) -> Row:
        """The mean of the probabilities of those that succeeded, scored on the test cases."""
        names = [row["name"] for row in rows if not row["failure"]]
        row: Row = {"name": f"ensemble of {len(names)}", "failure": None}
        log, folder = self.output / "ensemble.log", self.output / "ensemble"
        try:
            run(["ensemble", "-i", *(self.output / name for name in names), "-o", folder], log)
            row["test"] = self._score(folder, log)
        except subprocess.CalledProcessError:
            row["failure"] = log.read_text(encoding="utf-8").strip().splitlines()[-1][:200]
        return row

    def _train(self, entry: Entry, row: Row, log: Path, end: float | None) -> None:
        words = ["train", self.dataset.name, entry.configuration, *self.folds, "-tr", entry.network, "--npz"]
        row["train_s"] = run([*words, *entry.options, "-device", self.device, "--root", self.root], log, end)
        if len(self.folds) > 1:
            summary = read_json(self._results(entry) / "summary.json")
            row["crossval"] = {key: mean["Dice"] for key, mean in summary["mean"].items()}

    def _predict(self, entry: Entry, row: Row, log: Path, end: float | None) -> None:
        device = {"gpu": "cuda"}.get(self.device, self.device)
        words = ["predict", "-i", self.dataset.folder / "imagesTs", "-o", self.output / entry.name]
        words += ["-d", self.dataset.name, "-c", entry.configuration, "-tr", entry.network, "-f", *self.folds]
        words += ["--save_probabilities", "--device", device, "--root", self.root]
        row["predict_s"] = run(words, log, end)
        row["test_before"] = self._score(self.output / entry.name, log)

    def _finish(self, entry: Entry, row: Row, log: Path, end: float | None) -> None:
        rule, final = self._results(entry) / FILE, self.output / f"{entry.name}_final"
        if rule.exists():
            run(["postprocess", "-i", self.output / entry.name, "-o", final, "-pp", rule], log, end)
            row["steps"] = json.loads(rule.read_text(encoding="utf-8"))["steps"]
        row["test"] = self._score(final if rule.exists() else self.output / entry.name, log)

    def _score(self, folder: Path, log: Path) -> dict[str, float]:
        truth = self.dataset.folder / "labelsTs"
        if not truth.is_dir():
            return {}
        words = ["evaluate", truth, folder, "-djfile", self.dataset.folder / "dataset.json"]
        run([*words, "-o", folder / "summary.json"], log)
        return {key: mean["Dice"] for key, mean in read_json(folder / "summary.json")["mean"].items()}

    def _results(self, entry: Entry) -> Path:
        folder = self.root / "nnUNet_results" / self.dataset.name
        model = folder / folder_name(entry.network, PLANS, entry.configuration)
        return model / f"crossval_results_folds_{'_'.join(self.folds)}"


def run(words: Sequence[object], log: Path, end: float | None = None) -> float:
    """A command of vmamba medseg in a process of its own, until ``end`` of the monotonic clock; its seconds.

    CalledProcessError or TimeoutExpired; what it says goes to ``log``.
    """
    text, start = [str(word) for word in words], time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ vmamba medseg {' '.join(text)}\n")
        file.flush()
        line = [sys.executable, "-m", "vmamba.tools.cli", "medseg", *text, "--no-progress"]
        left = None if end is None else max(end - start, 1.0)
        subprocess.run(line, check=True, stdout=file, stderr=subprocess.STDOUT, timeout=left)
    return time.monotonic() - start


def compare(
    comparison: Comparison, entries: Sequence[Entry], jobs: int, done: Callable[[Row], object] = lambda row: None
) -> list[Row]:
    """The rows of the entries, ``jobs`` at a time, and of their ensemble; compare.json and compare.md in the output.

    Both are written, and ``done`` is called, with each row as it is ready. What fails is told in its row.
    """
    found: dict[str, Row] = {}
    rows: list[Row] = []
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(comparison.life, entry) for entry in entries]):
            row = future.result()
            found[row["name"]] = row
            rows = [found[entry.name] for entry in entries if entry.name in found]
            _write(comparison, rows)
            done(row)
    if sum(not row["failure"] for row in rows) > 1:
        rows.append(comparison.ensemble(rows))
        _write(comparison, rows)
    return rows


def _write(comparison: Comparison, rows: Sequence[Row]) -> None:
    """What is known so far, so that a run that is cut leaves it."""
    names = dict(zip(comparison.dataset.labels.keys, comparison.dataset.labels.names, strict=True))
    write_json(comparison.output / "compare.json", {"dataset": comparison.dataset.name, "labels": names, "rows": rows})
    (comparison.output / "compare.md").write_text(table(rows), encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Mean Dice over the foreground as a Markdown table: cross-validation, test cases, those after post-processing."""
    lines = ["| network | cross-validation | test | post-processed | training s | prediction s | failure |"]
    lines.append("|---|---:|---:|---:|---:|---:|---|")
    for row in rows:
        dice = [_mean(row.get(key)) for key in ("crossval", "test_before", "test")]
        seconds = [f"{row[key]:.0f}" if key in row else "-" for key in ("train_s", "predict_s")]
        lines.append(f"| {' | '.join([row['name'], *dice, *seconds, row['failure'] or ''])} |")
    return "\n".join(lines) + "\n"


def _mean(dice: dict[str, float | None] | None) -> str:
    values = [v for v in (dice or {}).values() if v is not None]
    return f"{sum(values) / len(values):.4f}" if values else "-"

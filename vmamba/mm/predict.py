"""Predictions for many pictures: finished ones are kept, unreadable ones are named and left out."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from vmamba.mm.files import write_json
from vmamba.mm.journal import Journal
from vmamba.mm.network import Network, one_line
from vmamba.mm.pictures import why_not_whole

SUMMARY = "summary.json"


class Task(Protocol):
    """What is written of predictions."""

    folders: tuple[str, ...]

    def write(self, image: np.ndarray, sample: Any, files: Sequence[Path]) -> dict[str, Any]:
        """Write a picture's outputs, one file in each of ``folders``; returns what the journal keeps of it."""
        ...

    def collect(self, folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Write what there is one of for all pictures."""
        ...

    def counts(self, records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
        """Totals by class name, the largest first."""
        ...

    def headline(self, counts: Mapping[str, int]) -> str:
        """Those totals in a few words."""
        ...


@dataclass
class Summary:
    """What a run did: pictures in the folder, new ones, kept ones, ``{file: reason}`` of failures, totals by class."""

    pictures: int = 0
    new: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)


def predict(network: Network, task: Task, pictures: Mapping[str, Path], folder: Path, journal: Journal) -> Summary:
    """Write the outputs of those ``pictures`` (name -> file) that the journal lacks, and the totals of all in it.

    Interrupted by Ctrl-C, it still writes the totals, with ``stopped`` set.
    """
    summary, start = Summary(), time.monotonic()
    todo = {name: path for name, path in pictures.items() if not journal.has(name, path)}
    summary.kept = len(pictures) - len(todo)
    bar = tqdm(todo.items(), desc=folder.name, unit="picture", disable=None)
    try:
        for name, path in bar:
            reason = _one(network, task, name, path, journal)
            if reason is None:
                summary.new += 1
            else:
                summary.failed[str(path)] = reason
                bar.write(f"vmamba: {path}: {reason}; left out", file=sys.stderr)
    except KeyboardInterrupt:
        summary.stopped = True
    bar.close()
    records = list(journal.records.values())
    task.collect(folder, records)
    summary.pictures, summary.counts = len(records), task.counts(records)
    summary.seconds = round(time.monotonic() - start, 3)
    return summary


def _one(network: Network, task: Task, name: str, path: Path, journal: Journal) -> str | None:
    """Predict one picture and write its outputs; returns why that failed, if it did."""
    reason = why_not_whole(path)
    if reason is not None:
        return reason
    try:
        image, sample = network.predict(path)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        return one_line(error)
    journal.add(name, path, task.write(image, sample, journal.files(name)))
    return None


def write_summary(folder: Path, summary: Summary, about: Mapping[str, Any]) -> None:
    """Write ``summary.json``: what the run did, after what it was ``about`` (command, checkpoint, device ...)."""
    write_json(folder / SUMMARY, {**about, **asdict(summary)})

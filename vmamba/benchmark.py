"""Times of several candidates in one run: all are prepared, then take turns; a machine's moods hit all of them."""

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch

from vmamba import memory
from vmamba.clock import Step, cold_memory, graphed, seconds, with_room

LEAST = 3  # repetitions, whatever they take
OOM = "OOM"
NO_MEMORY = "can't allocate memory", "bad_alloc"  # how PyTorch on a CPU says so

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A candidate that is ready: ``step`` does it once, ``held`` bytes stay between steps (weights, inputs).

    ``count(step)`` runs the step and returns the bytes that it moves.
    """

    step: Step
    held: int
    count: Callable[[Step], int] = memory.moved


@dataclass(frozen=True)
class Job:
    """A candidate by what is known of it beforehand: its row's first entries (``name`` among them), how it is made.

    ``smaller`` gives a job with less to do, for when memory does not suffice, or None.
    """

    facts: Mapping[str, Any]
    make: Callable[[], Work]
    smaller: "Callable[[], Job | None]" = lambda: None


@dataclass(frozen=True)
class Plan:
    """How to measure: ``repeat`` repetitions after ``warmup`` more; from the third on, no more than fit in ``seconds``.

    cold: empty a GPU's caches before each repetition, and leave the host's time out (``clock.seconds``).
    graph: time the replay of a CUDA graph of the step.
    """

    device: torch.device
    repeat: int = 20
    warmup: int = 3
    seconds: float = 10.0
    cold: bool = False
    graph: bool = False


def measure(jobs: Sequence[Job], plan: Plan, tell: Callable[[str], object] = lambda text: None) -> list[Row]:
    """One row per job: its facts, and what was measured.

    Rows get ``ms`` (median), ``ms_quartiles``, ``repeats``, ``peak_bytes``, ``moved_bytes``, ``beside`` (the names that
    took turns) and ``failure``: None, ``OOM`` or one line. A row that failed lacks the others, and the run goes on.
    ``tell`` is called with what is being done.
    """
    with torch.cuda.device(plan.device) if plan.device.type == "cuda" else nullcontext():
        rows, steps = [], {}
        for index, job in enumerate(jobs):
            tell(f"{job.facts['name']}, preparing")
            row, step = _prepare(job, plan)
            rows.append(row)
            if step is not None:
                steps[index] = step
        times, failures = with_room(lambda: _take_turns(steps, plan, lambda index: tell(rows[index]["name"])))
    for index, failure in failures.items():
        rows[index] = {**jobs[index].facts, "failure": failure}
    beside = [rows[index]["name"] for index in times]
    for index, spent in times.items():
        low, median, high = quantiles([1e3 * t for t in spent], n=4, method="inclusive")
        rows[index].update(ms=median, ms_quartiles=[low, high], repeats=len(spent), beside=beside)
    return rows


def clean_up() -> None:
    """Free what finished candidates left: memory, and what was compiled for them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _prepare(job: Job, plan: Plan) -> tuple[Row, Step | None]:
    try:
        graphs = memory.kept_by_graphs(plan.device)
        work = job.make()
        row = {**job.facts, "failure": None, "moved_bytes": work.count(work.step)}
        _warm_up(work.step, plan)
        grown = memory.peak(work.step, plan.device)
        graphs = memory.kept_by_graphs(plan.device) - graphs
        row["peak_bytes"] = None if grown is None else work.held + graphs + grown
        return row, graphed(work.step) if plan.graph else work.step
    except Exception as error:  # whatever goes wrong with one candidate is told in its row
        failure = _reason(error)
    work = None
    _free()
    smaller = job.smaller() if failure == OOM else None
    return _prepare(smaller, plan) if smaller else ({**job.facts, "failure": failure}, None)


def _warm_up(step: Step, plan: Plan) -> None:
    start = time.perf_counter()
    for _ in range(plan.warmup):
        seconds(step, plan.device)
        if time.perf_counter() - start > plan.seconds:
            return


def _take_turns(
    steps: Mapping[int, Step], plan: Plan, tell: Callable[[int], object]
) -> tuple[dict[int, list[float]], dict[int, str]]:
    times: dict[int, list[float]] = {index: [] for index in steps}
    failures: dict[int, str] = {}
    cold = cold_memory(plan.device) if plan.cold else None
    for repetition in range(plan.repeat):
        for index in list(times)[:: -1 if repetition % 2 else 1]:
            if len(times[index]) >= LEAST and sum(times[index]) > plan.seconds:
                continue
            tell(index)
            try:
                times[index].append(seconds(steps[index], plan.device, cold))
            except Exception as error:  # likewise
                failures[index] = _reason(error)
                del times[index]
                _free()
    return times, failures


def _reason(error: Exception) -> str:
    text = str(error).strip()
    lacks_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in text for sign in NO_MEMORY)
    return OOM if lacks_memory else f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"

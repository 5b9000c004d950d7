"""A run of ``vmamba benchmark``: what the machine is, every point measured in turn, a line for each row."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from vmamba import memory
from vmamba.benchmark import Job, Plan, Row, clean_up, measure
from vmamba.errors import UserError
from vmamba.machine import machine
from vmamba.tools import benchmark_anchors, benchmark_models, benchmark_operators, benchmark_table
from vmamba.tools.benchmark_results import Results


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for, or a GPU if there is one; checks what else depends on it.

    Raises:
        UserError: there is no such device, or an option does not fit it.
    """
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device takes cpu, cuda or cuda:NUMBER, got {args.device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device takes cpu, cuda or cuda:NUMBER, got {args.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {device}; PyTorch finds {torch.cuda.device_count()} GPUs")
    if args.cuda_graph and device.type != "cuda":
        raise UserError("--cuda-graph needs a CUDA GPU")
    if args.repeat < 3 or args.warmup < 0:
        raise UserError(f"--repeat takes 3 or more and --warmup 0 or more, got {args.repeat} and {args.warmup}")
    if not args.seconds > 0:
        raise UserError(f"--seconds takes a positive number, got {args.seconds:g}")
    return device


def models(names: Sequence[str], args: argparse.Namespace, setting: benchmark_models.Setting) -> Mapping[str, Any]:
    """Measure networks; returns what ``--json`` writes."""
    tasks = benchmark_models.TASKS if args.train else benchmark_models.TASKS[:1]
    points = list(benchmark_models.points(names, args.sizes, tasks, setting))
    plain = not (setting.compile or setting.channels_last or args.cuda_graph)
    recorded = benchmark_anchors.of_networks if plain else _nothing
    plan = _plan(args, setting.device)
    head = _head("models", setting, plan)
    results = Results(head, benchmark_models.KEY, args.json, args.resume)
    _run(points, plan, results, benchmark_table.MODELS, lambda rows: recorded(rows, setting.precision), args)
    return {**head, "rows": results.rows}


def operators(names: Sequence[str], args: argparse.Namespace, setting: benchmark_operators.Setting) -> None:
    """Measure operators."""
    tasks = benchmark_operators.TASKS if args.train else benchmark_operators.TASKS[:1]
    points = list(benchmark_operators.points(names, tasks, setting))
    plan = _plan(args, setting.device, cold=True)
    results = Results(_head("operators", setting, plan), benchmark_operators.KEY, args.json, args.resume)
    recorded = benchmark_anchors.of_operators
    _run(points, plan, results, benchmark_table.OPERATORS, lambda rows: recorded(rows, setting.precision), args)


def _plan(args: argparse.Namespace, device: torch.device, cold: bool = False) -> Plan:
    return Plan(device, args.repeat, args.warmup, args.seconds, cold, args.cuda_graph)


def _head(kind: str, setting: Any, plan: Plan) -> dict[str, Any]:
    on_gpu = plan.device.type == "cuda"
    tf32 = ("not allowed" if setting.precision == "fp32" else "allowed") if on_gpu else "none on a CPU"
    clock = "CUDA events" if on_gpu else "wall clock"
    graph, caches = " of replayed CUDA graphs" if plan.graph else "", ", cold caches" if plan.cold and on_gpu else ""
    timing = f"{clock}{graph}{caches}; medians, all of a point in turn"
    facts = {**setting.facts(), "TF32": tf32, "timing": timing, "peak": memory.PEAK}
    return {"kind": kind, "machine": machine(plan.device), "setting": facts}


def _nothing(rows: Sequence[Row], precision: str) -> list[Row]:
    return []


def _run(
    points: Sequence[Sequence[Job]],
    plan: Plan,
    results: Results,
    columns: benchmark_table.Columns,
    recorded: Callable[[Sequence[Row]], list[Row]],
    args: argparse.Namespace,
) -> None:
    for title, text in (*results.head["machine"].items(), *results.head["setting"].items()):
        print(f"{title:10} {text}")
    table = benchmark_table.Table(columns, [dict(job.facts) for jobs in points for job in jobs])
    print(f"\n{table.header()}", flush=True)
    old, hide = False, args.no_progress or None
    progress = tqdm(total=sum(map(len, points)), disable=hide, unit="row")
    with memory.kept_free(plan.device), _tf32(results.head["setting"]["TF32"]), progress as bar:

        def tell(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(0)

        for jobs in points:
            results.add(measure(results.missing(jobs), plan, tell))
            rows = results.of(jobs)
            others = recorded(rows) if rows else []
            old = old or bool(others)
            for row in benchmark_table.with_ratios([*rows, *others]):
                tqdm.write(table.line(row))
            bar.update(len(jobs))
            clean_up()
    if old:
        print(f"\n{benchmark_anchors.MARK} {benchmark_anchors.WHERE}")


@contextmanager
def _tf32(text: str) -> Iterator[None]:
    """TF32 allowed or not on a GPU, and as it was afterwards."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = text == "allowed"
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before

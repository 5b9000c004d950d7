"""A run of ``vmamba medseg benchmark``: what the machine is, every task in turn, a line for each row."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from tqdm import tqdm

from vmamba.benchmark import OOM, Row, clean_up
from vmamba.machine import machine
from vmamba.medical.benchmark import baseline
from vmamba.medical.benchmark_feed import BUSY
from vmamba.medical.window import VOXELS
from vmamba.tools.benchmark_results import Results
from vmamba.tools.benchmark_table import SHARED, Columns, Table, fact, number, with_ratios

Task = tuple[Sequence[Row], Callable[[], Sequence[Row]]]  # what is known of its rows, and what measures them

PLACE: Columns = {
    "network": fact("name"),
    "case": lambda row: f"{row['patch']}, batch {row['batch']}, {row['precision']}",
}
PEAK: Columns = {"peak GiB": SHARED["peak GiB"], "failure": SHARED["failure"]}
TRAIN: Columns = {
    **PLACE,
    "it/s": number(lambda row: 1e3 * row["steps"] / row["ms"]),
    "time ratio": SHARED["ratio"],
    **PEAK,
}
FEED: Columns = {
    **PLACE,
    "workers": fact("workers"),
    "loading alone /s": number(lambda row: row["loading_per_s"]),
    "it/s, not loading": number(lambda row: row["without_per_s"]),
    "it/s, loading": number(lambda row: row["with_per_s"]),
    "GPU busy %, not loading": number(lambda row: 100 * row["busy_without"]),
    "GPU busy %, loading": number(lambda row: 100 * row["busy"]),
    "failure": SHARED["failure"],
}
PREDICT: Columns = {
    **PLACE,
    "windows": fact("windows"),
    "mirrors": fact("mirrors"),
    "network s": number(lambda row: row["windows_s"]),
    "whole s": number(lambda row: row["whole_s"]),
    **PEAK,
}
NOTES: Mapping[str, Mapping[str, str]] = {
    "train": {
        "step": "forward, nnU-Net's loss (deep where the network is), backward, clipping, SGD; patches on the device",
        "launches": "a GPU's forward and backward are a CUDA graph, as in training on one GPU",
        "convolutions": "cuDNN has tried its algorithms for the patch, as in training",
        "timing": "medians of rounds of steps, all of a setup in turn; ratio: time, relative to nnU-Net's network",
    },
    "feed": {
        "loop": "Lightning's, as vmamba medseg train runs it, nnU-Net's augmentation; not loading: one batch, there",
        "GPU busy": BUSY,
    },
    "predict": {
        "network s": "from voxels in main memory to logits, the least; whole s: from the file to the mask on disk",
        "at once": f"windows of {VOXELS['cuda'] / 1e6:.1f} million voxels on a GPU, if not asked otherwise",
    },
}


def run(columns: Columns, key: Sequence[str], tasks: Sequence[Task], device: torch.device, args: Any) -> None:
    """Measures the tasks, prints their rows and writes them; what fails says so in its row."""
    results = Results(_head(device, args.what), key, args.json)
    for title, text in (*results.head["machine"].items(), *results.head["setting"].items()):
        print(f"{title:10} {text}")
    table = Table(columns, [row for facts, _ in tasks for row in facts])
    print(f"\n{table.header()}", flush=True)
    with tqdm(total=len(tasks), disable=args.no_progress or None, unit="task") as bar:
        for facts, measure in tasks:
            bar.set_postfix_str(facts[0]["name"])
            rows = _rows(facts, measure)
            results.add(rows)
            for row in with_ratios(rows) if args.what == "train" else rows:
                tqdm.write(table.line(row))
            bar.update()
            clean_up()


def _rows(facts: Sequence[Row], measure: Callable[[], Sequence[Row]]) -> Sequence[Row]:
    try:
        return measure()
    except torch.OutOfMemoryError:
        failure = OOM
    except Exception as error:  # whatever goes wrong with one network is told in its row
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return [{**row, "failure": failure} for row in facts]


def _head(device: torch.device, what: str) -> dict[str, Any]:
    flags = f"convolutions {torch.backends.cudnn.allow_tf32}, matrix products {torch.backends.cuda.matmul.allow_tf32}"
    facts = {"nnU-Net": baseline(), "TF32": f"{flags} (PyTorch's defaults)", **NOTES[what]}
    about = machine(device)
    about["versions"] += f", monai {version('monai')}, lightning {version('lightning')}"
    return {"kind": f"medseg {what}", "machine": about, "setting": facts}

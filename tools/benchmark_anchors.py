"""Figures measured elsewhere, which ``vmamba benchmark`` prints beside its own where shape and precision are the same.

All are medians of CUDA-event timings on one NVIDIA H200 with torch 2.11.0+cu130 and Triton 3.6.0, 2026-11-20, random
data. "official" is MzeroMiko/VMamba with its own CUDA scan ("oflex"), "mamba" the scan of state-spaces/mamba; both were
compiled by nvcc 13.0 with -O3 --use_fast_math for sm_90. Networks: eager, training without an optimiser.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vmamba.benchmark import Row

WHERE = "recorded on one NVIDIA H200 on 2026-11-20, torch 2.11.0+cu130, Triton 3.6.0; not part of this run"
MARK = "*"

# (size, batch, precision): name: images per second of inference and of training, peak GiB of training
NETWORKS = {
    (224, 128, "bf16"): {
        "official VMamba-T s1l8": (3057, 1157, 13.0),
        "official VMamba-S s2l15": (1631, 581, 23.2),
        "official VMamba-B s2l15": (1299, 457, 30.6),
    },
    (224, 128, "tf32"): {
        "official VMamba-T s1l8": (1413, 617, 21.2),
        "official VMamba-S s2l15": (530, 291, 39.6),
        "official VMamba-B s2l15": (400, 241, 52.5),
    },
    (1024, 8, "bf16"): {"official VMamba-T s1l8": (160, 59, 16.7)},
    (1024, 8, "tf32"): {"official VMamba-T s1l8": (66, 27, 27.5)},
}

# operator, case as (numbers, precision): name: ms of forward, of forward and backward; None was not measured
OPERATORS = {
    "selective_scan": {
        ("128, 4, 3136, 96, 1", "bf16"): {"oflex": (1.05, 3.64), "mamba": (1.06, 3.76)},
        ("128, 4, 196, 384, 1", "bf16"): {"oflex": (0.29, 0.96), "mamba": (0.30, 1.18)},
        ("128, 1, 197, 384, 16", "bf16"): {"oflex": (0.38, 1.30), "mamba": (0.38, 1.51)},
        ("8, 1, 6085, 384, 16", "bf16"): {"oflex": (0.54, 2.21), "mamba": (0.54, 2.67)},
        ("4, 4, 65536, 96, 1", "bf16"): {"oflex": (0.38, 1.55), "mamba": (0.38, 1.36)},
        ("8, 4, 3136, 192, 16", "bf16"): {"oflex": (0.69, 2.69), "mamba": (0.69, 3.01)},
    },
    "ss2d": {
        ("128, 56, 56, 96", "bf16"): {"official": (4.57, 13.05)},
        ("128, 28, 28, 192", "bf16"): {"official": (2.07, 6.38)},
        ("128, 14, 14, 384", "bf16"): {"official": (1.16, 3.87)},
        ("128, 7, 7, 768", "bf16"): {"official": (0.97, 3.77)},
        ("4, 256, 256, 96", "bf16"): {"official": (2.76, 8.21)},
    },
    "scan2d": {  # with the two projections and the output norm, which our operator does not have
        ("128, 56, 56, 96, 1", "bf16"): {"official core": (4.06, None)},
        ("128, 28, 28, 192, 1", "bf16"): {"official core": (1.80, None)},
        ("128, 14, 14, 384, 1", "bf16"): {"official core": (0.98, None)},
        ("128, 7, 7, 768, 1", "bf16"): {"official core": (0.82, None)},
        ("4, 256, 256, 96, 1", "bf16"): {"official core": (2.42, None)},
    },
}


def of_networks(rows: Sequence[Row], precision: str) -> list[Row]:
    """Rows of what was recorded for the size, batch and task of ``rows``, the results of one point."""
    first = rows[0]
    training = first["task"] == "training"
    found = []
    for name, figures in NETWORKS.get((first["size"], first["batch"], precision), {}).items():
        peak = {"peak_bytes": figures[2] * 2**30} if training else {}
        found.append(_row(first, name, 1e3 * first["batch"] / figures[training], **peak))
    return found


def of_operators(rows: Sequence[Row], precision: str) -> list[Row]:
    """Rows of what was recorded for the operator, shape and task of ``rows``, the results of one point."""
    first = rows[0]
    recorded: Mapping[Any, Mapping[str, Any]] = OPERATORS.get(first["operator"], {})
    figures = recorded.get((first["numbers"], precision), {})
    backward = first["task"] != "forward"
    return [_row(first, name, pair[backward]) for name, pair in figures.items() if pair[backward] is not None]


def _row(like: Row, name: str, ms: float, **further: Any) -> Row:
    known = "operator", "letters", "case", "numbers", "task", "size", "batch"
    facts = {key: like[key] for key in known if key in like}
    return {**facts, "name": f"{name} {MARK}", "failure": None, "ms": ms, **further}

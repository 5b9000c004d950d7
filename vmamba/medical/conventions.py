"""Metric conventions of the 2D papers, by name: figures of one are never mixed with those of another.

``isic``: one confusion matrix over all pixels of all images (VM-UNet's evaluation of ISIC 2017 and 2018). ``synapse``
and ``acdc``: Dice and HD95 of each volume and class, then their mean (TransUNet's and MT-UNet's evaluation).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.evaluate import check_new, classes_or, paired, write_summary
from vmamba.medical.labelset import LabelSet
from vmamba.medical.layout import Layout
from vmamba.medical.layouts import find_layout
from vmamba.medical.readers import check_pair, read_label
from vmamba.medical.resize import RESIZERS, nearest
from vmamba.medical.several import in_order

Pair = tuple[np.ndarray, np.ndarray]
WORDS = {
    "isic": "counts of all pixels of all images in one confusion matrix; foreground is every value above 0",
    "volumes": "per volume and class, then the mean over volumes and classes; HD95 in voxels: 95th percentile of the "
    "surface distances of both directions pooled (medpy); prediction without truth: Dice 1, HD95 0; none: 0, 0",
}


def hd95(truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float] | None = None) -> float:
    """95th percentile of the distances from either surface to the other, pooled (medpy's); masks must not be empty."""
    one, two = _surface(truth), _surface(predicted)
    there = distance_transform_edt(~one, spacing)[two]  # pyright: ignore[reportOptionalSubscript]
    back = distance_transform_edt(~two, spacing)[one]  # pyright: ignore[reportOptionalSubscript]
    return float(np.percentile(np.concatenate([there, back]), 95))


def _surface(mask: np.ndarray) -> np.ndarray:
    inner = np.asarray(binary_erosion(mask, generate_binary_structure(mask.ndim, 1)), bool)
    return mask & ~inner


def pooled(pairs: Sequence[Pair]) -> dict[str, float]:
    """mIoU, DSC, accuracy, sensitivity, specificity of all (truth, prediction) masks together; 0 where 0/0."""
    return shares([counts(truth, predicted) for truth, predicted in pairs])


def counts(truth: np.ndarray, predicted: np.ndarray) -> dict[str, int]:
    """TP, FP, FN, TN of two masks."""
    tp, fp = np.count_nonzero(truth & predicted), np.count_nonzero(~truth & predicted)
    fn = np.count_nonzero(truth & ~predicted)
    return {"TP": int(tp), "FP": int(fp), "FN": int(fn), "TN": truth.size - int(tp) - int(fp) - int(fn)}


def shares(rows: Sequence[dict[str, int]]) -> dict[str, float]:
    """The figures of :func:`pooled` of the counts of each image."""
    tp, fp, fn, tn = (sum(row[name] for row in rows) for name in ("TP", "FP", "FN", "TN"))
    figures = {
        "mIoU": (tp, tp + fp + fn),
        "DSC": (2 * tp, 2 * tp + fp + fn),
        "accuracy": (tp + tn, tp + tn + fp + fn),
        "sensitivity": (tp, tp + fn),
        "specificity": (tn, tn + fp),
    }
    return {name: part / whole if whole else 0.0 for name, (part, whole) in figures.items()}


def volume_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Dice and HD95 (voxels) of two masks by the papers' rule: (1, 0) without truth, (0, 0) without prediction."""
    if not predicted.any():
        return {"Dice": 0.0, "HD95": 0.0}
    if not truth.any():
        return {"Dice": 1.0, "HD95": 0.0}
    dice = 2 * np.count_nonzero(truth & predicted) / (np.count_nonzero(truth) + np.count_nonzero(predicted))
    return {"Dice": float(dice), "HD95": hd95(truth, predicted)}


@dataclass
class Task:
    """What a convention is applied to: (truth, prediction) files, classes times ``unit``, and their layout or None."""

    pairs: Sequence[tuple[Path, Path]]
    labels: LabelSet
    unit: int
    layout: Layout | None
    progress: bool
    threads: int

    def rows(self, metrics: Callable[[Path, np.ndarray, np.ndarray], dict[str, Any]]) -> list[dict[str, Any]]:
        """Of each pair its files and ``metrics(truth's file, truth (s, h, w), prediction (s, h, w))``."""

        def row(pair: tuple[Path, Path]) -> dict[str, Any]:
            truth, predicted = pair
            one, two = read_label(truth, 2), read_label(predicted, 2)
            check_pair(one[:, None], two, [truth], predicted)
            found = metrics(truth, one, two)
            return {"metrics": found, "prediction_file": str(predicted), "reference_file": str(truth)}

        done = in_order(row, self.pairs, self.threads)
        return list(tqdm(done, "evaluate", len(self.pairs), unit="case", disable=not self.progress))


def _isic(task: Task) -> dict[str, Any]:
    size = task.layout.scored_at if task.layout else None

    def metrics(truth: Path, one: np.ndarray, two: np.ndarray) -> dict[str, Any]:
        if task.layout:
            one = task.layout.label(truth)
        if size:
            one, two = RESIZERS["bilinear"].label(one, size), nearest(two, size)
        return {"1": counts(one > 0, two > 0)}

    cases = task.rows(metrics)
    words = WORDS["isic"] + (f"; compared at {size[0]} x {size[1]}, as the papers do" if size else "")
    figures = shares([case["metrics"]["1"] for case in cases])
    return {"conventions": words, "pooled": figures, "images": len(cases), "metric_per_case": cases}


def _volumes(task: Task) -> dict[str, Any]:
    labels = task.labels

    def metrics(_: Path, one: np.ndarray, two: np.ndarray) -> dict[str, Any]:
        one, two = one // task.unit, two // task.unit
        return {
            key: volume_scores(np.isin(one, values), np.isin(two, values))
            for key, values in zip(labels.keys, labels.targets, strict=True)
        }

    cases = task.rows(metrics)
    mean = {k: {m: float(np.mean([c["metrics"][k][m] for c in cases])) for m in ("Dice", "HD95")} for k in labels.keys}
    total = {m: float(np.mean([row[m] for row in mean.values()])) for m in ("Dice", "HD95")}
    names = dict(zip(labels.keys, labels.names, strict=True))
    return {
        **{"conventions": WORDS["volumes"], "names": names, "foreground_mean": total, "mean": mean},
        "metric_per_case": cases,
    }


BY_NAME: dict[str, Callable[[Task], dict[str, Any]]] = {"isic": _isic, "synapse": _volumes, "acdc": _volumes}


def evaluate_by(
    name: str,
    truth: Path,
    predicted: Path,
    output: Path | None = None,
    *,
    labels: LabelSet | None = None,
    overwrite: bool = False,
    progress: bool = True,
    threads: int = 1,
    chill: bool = False,
) -> dict[str, Any]:
    """The summary of two folders of masks by the convention ``name``; written with a .csv if ``output`` is given.

    ``truth`` may be the folder of a paper's layout: its tested cases, classes and size are taken. The options are those
    of :func:`vmamba.medical.evaluate.evaluate`.
    """
    if name not in BY_NAME:
        raise UserError(f"--convention {name}: unknown; choose from nnunet, {', '.join(BY_NAME)}")
    check_new(output, overwrite)
    pairs = paired(truth, predicted, chill)
    labels, unit = classes_or(labels, truth, pairs)
    summary = BY_NAME[name](Task(pairs, labels, unit, find_layout(truth), progress, threads))
    return write_summary(output, {"convention": name, **summary})


def convention_of(truth: Path) -> str:
    """The convention of the layout that ``truth`` has, else nnU-Net's."""
    layout = find_layout(truth)
    return layout.convention if layout else "nnunet"

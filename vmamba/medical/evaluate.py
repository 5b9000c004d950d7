"""Dice and IoU of predicted masks, per case and class, in the layout and by the rule of nnU-Net's summary.json."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics.confusion_matrix import get_confusion_matrix
from monai.networks.utils import one_hot
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.cases import LABELS, list_images
from vmamba.medical.labels import label_values, to_classes
from vmamba.medical.readers import check_pair, read_label
from vmamba.medical.runs import write_json

CONVENTIONS = {
    "Dice": "2 TP / (2 TP + FP + FN), per case and class",
    "IoU": "TP / (TP + FP + FN), per case and class",
    "empty": "class absent from truth and prediction: null, left out of the means (nnU-Net's rule); "
    "absent from one of them only: 0",
    "mean": "per class: mean over the cases that have a value; foreground_mean: mean of those over the classes but 0",
    "counts": "TP, FP, FN, TN, n_pred, n_ref in voxels; in the means, their averages over the cases",
}


def evaluate(
    truth: Path, predicted: Path, output: Path | None = None, *, overwrite: bool = False, progress: bool = True
) -> dict:
    """Compares the masks of two folders by name; writes summary.json and the .csv beside it if ``output`` is given."""
    table = output.with_suffix(".csv") if output else None
    for path in (output, table):
        if path and path.exists() and not overwrite:
            raise UserError(f"{path}: exists; give another name or --overwrite")
    references, guesses = list_images(truth, LABELS), list_images(predicted, LABELS)
    if not references:
        raise UserError(f"{truth}: holds no masks; expected files ending in {', '.join(LABELS)}")
    for name, path in references.items():
        if name not in guesses:
            raise UserError(
                f"{path}: has no prediction; expected {predicted / name}.* ({len(guesses)} other file(s) there)"
            )
    pairs = [(path, guesses[name]) for name, path in references.items()]
    values = _classes(references, guesses)
    cases = [_case(t, p, values) for t, p in tqdm(pairs, desc="evaluate", unit="case", disable=not progress)]
    summary = summarise(cases, len(values))
    if output and table:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, summary)
        _write_csv(table, cases)
    return summary


def scores(truth: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, dict[str, float]]:
    """``{class: {Dice, IoU, FN, FP, TN, TP, n_pred, n_ref}}`` of two arrays of classes; NaN where both are empty."""
    one, two = (torch.from_numpy(a.reshape(len(a), 1, -1).astype(np.int64)) for a in (predicted, truth))
    first, second = (one_hot(a, classes, dtype=torch.uint8) for a in (one, two))
    counts = get_confusion_matrix(first, second).double().sum(0)  # (k, 4), by slice first: exact beyond 2**24 voxels
    result = {}
    for k in range(1, classes):
        tp, fp, tn, fn = (int(v) for v in counts[k])
        union = tp + fp + fn
        result[str(k)] = {
            "Dice": 2 * tp / (union + tp) if union else math.nan,
            "IoU": tp / union if union else math.nan,
            **{"FN": fn, "FP": fp, "TN": tn, "TP": tp, "n_pred": tp + fp, "n_ref": tp + fn},
        }
    return result


def summarise(cases: list[dict[str, Any]], classes: int) -> dict[str, Any]:
    """nnU-Net's summary: foreground_mean, mean per class, metric_per_case; and the conventions in words."""
    mean = {}
    for k in map(str, range(1, classes)):
        rows = [case["metrics"][k] for case in cases]
        mean[k] = {metric: _mean([row[metric] for row in rows]) for metric in rows[0]}
    foreground = {metric: _mean([m[metric] for m in mean.values()]) for metric in mean["1"]}
    return {"conventions": CONVENTIONS, "foreground_mean": foreground, "mean": mean, "metric_per_case": cases}


def _mean(values: list[float]) -> float:
    present = [v for v in values if not math.isnan(v)]
    return sum(present) / len(present) if present else math.nan


def _classes(*folders: dict[str, Path]) -> list[int]:
    found = {str(p): np.unique(read_label(p, 0)) for files in folders for p in files.values()}
    values = sorted({int(v) for unique in found.values() for v in unique})
    if 255 in values and values != [0, 255]:
        return label_values(found)
    return [0, 255] if values[-1] == 255 else list(range(max(values[-1], 1) + 1))


def _case(truth: Path, predicted: Path, values: list[int]) -> dict[str, Any]:
    one, two = read_label(truth, 0), read_label(predicted, 0)
    check_pair(one[:, None], two, [truth], predicted)
    metrics = scores(to_classes(one, values, str(truth)), to_classes(two, values, str(predicted)), len(values))
    return {"metrics": metrics, "prediction_file": str(predicted), "reference_file": str(truth)}


def _write_csv(path: Path, cases: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "class", *cases[0]["metrics"]["1"]])
        for case in cases:
            for k, row in case["metrics"].items():
                figures = ["" if isinstance(v, float) and math.isnan(v) else v for v in row.values()]
                writer.writerow([Path(case["reference_file"]).name, k, *figures])


def table(summary: dict[str, Any]) -> str:
    """The means as a few lines of text."""
    lines = [f"{'class':<8}{'Dice':>8}{'IoU':>8}   ({len(summary['metric_per_case'])} case(s))"]
    for name, row in [*summary["mean"].items(), ("mean", summary["foreground_mean"])]:
        lines.append(f"{name:<8}{row['Dice']:>8.4f}{row['IoU']:>8.4f}")
    return "\n".join(lines)

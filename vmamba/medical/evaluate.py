"""Dice and IoU of predicted masks, per case and class, in the layout and by the rule of nnU-Net's summary.json."""

import csv
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.cases import ARRAYS, LABELS, list_images
from vmamba.medical.labels import label_values, summary
from vmamba.medical.labelset import LabelSet, classes
from vmamba.medical.layouts import find_layout
from vmamba.medical.readers import check_pair, read_label
from vmamba.medical.runs import write_json
from vmamba.medical.several import in_order
from vmamba.safety import replacing

CONVENTIONS = {
    "Dice": "2 TP / (2 TP + FP + FN), per case and class",
    "IoU": "TP / (TP + FP + FN), per case and class",
    "empty": "class absent from truth and prediction: null, left out of the means (nnU-Net's rule); "
    "absent from one of them only: 0",
    "mean": "per class: mean over the cases that have a value; foreground_mean: mean of those over the classes but 0",
    "counts": "TP, FP, FN, TN, n_pred, n_ref in voxels; in the means, their averages over the cases",
}


def evaluate(
    truth: Path,
    predicted: Path,
    output: Path | None = None,
    *,
    labels: LabelSet | None = None,
    overwrite: bool = False,
    progress: bool = True,
    threads: int = 1,
    chill: bool = False,
) -> dict:
    """Compares the masks of two folders by name; writes summary.json and the .csv beside it if ``output`` is given.

    ``truth`` may also be the folder of a paper's layout. ``labels`` are those of a dataset.json; without them the
    classes are those of the layout, or the values found. ``threads`` cases are compared at a time. ``chill``: masks
    without a prediction do not count.
    """
    check_new(output, overwrite)
    pairs = paired(truth, predicted, chill)
    labels, unit = classes_or(labels, truth, pairs)
    result = evaluate_pairs(pairs, labels, unit=unit, progress=progress, threads=threads)
    return write_summary(output, {"convention": "nnunet", **result})


def check_new(output: Path | None, overwrite: bool) -> None:
    """UserError if summary.json or the .csv beside it exist and may not be replaced."""
    for path in (output, output.with_suffix(".csv")) if output else ():
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists; give another name or --overwrite")


def write_summary(output: Path | None, summary: dict[str, Any]) -> dict[str, Any]:
    """Writes summary.json and the .csv beside it if ``output`` is given; returns the summary."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, summary)
        write_csv(output.with_suffix(".csv"), summary)
    return summary


def classes_or(labels: LabelSet | None, truth: Path, pairs: Sequence[tuple[Path, Path]]) -> tuple[LabelSet, int]:
    """(classes, the value of the first): as given, as the layout of ``truth`` has them, or as found in the files."""
    layout = find_layout(truth)
    if labels is None and layout and not layout.binary:
        return layout.labels, 1
    return (labels, 1) if labels else classes_of(pairs)


def paired(truth: Path, predicted: Path, chill: bool = False) -> list[tuple[Path, Path]]:
    """(truth, prediction) files of the same names in two folders; UserError if a mask has no prediction.

    With ``chill`` such masks are counted in a line, and UserError is for folders where all are of that kind.
    ``truth`` may hold masks, files of arrays, or a paper's layout, whose tested cases are taken.
    """
    layout = find_layout(truth)
    if layout:
        references = {case.name: case.label for case in layout.tested(truth) if case.label}
    else:
        references = list_images(truth, LABELS) or list_images(truth, ARRAYS)
    guesses = list_images(predicted, LABELS)
    if not references:
        raise UserError(f"{truth}: holds no masks; expected files ending in {', '.join(LABELS)}")
    alone = [name for name in references if name not in guesses]
    if alone and not (chill and len(alone) < len(references)):
        name = alone[0]
        raise UserError(
            f"{references[name]}: has no prediction; expected {predicted / name}.* ({len(guesses)} other file(s) there)"
        )
    if alone:
        print(f"{truth}: {len(alone)} of {len(references)} masks have no prediction and do not count (--chill)")
    return [(path, guesses[name]) for name, path in references.items() if name in guesses]


def evaluate_pairs(
    pairs: Sequence[tuple[Path, Path]], labels: LabelSet, *, unit: int = 1, progress: bool = True, threads: int = 1
) -> dict[str, Any]:
    """The summary of (truth, prediction) files, whose values are classes times ``unit``; ``threads`` at a time."""
    compared = in_order(partial(_case, labels, unit), pairs, threads)
    return summarise(list(tqdm(compared, "evaluate", len(pairs), unit="case", disable=not progress)))


def scores(truth: np.ndarray, predicted: np.ndarray, labels: LabelSet) -> dict[str, dict[str, float]]:
    """``{class or region: {Dice, IoU, FN, FP, TN, TP, n_pred, n_ref}}`` of label values; NaN where both are empty.

    Voxels whose truth is the ignore label count in none.
    """
    valid = np.ones(truth.shape, bool) if labels.ignore is None else truth != labels.ignore
    total, result = int(np.count_nonzero(valid)), {}
    for key, values in zip(labels.keys, labels.targets, strict=True):
        one, two = np.isin(truth, values) & valid, np.isin(predicted, values) & valid
        n_ref, n_pred, tp = (int(np.count_nonzero(a)) for a in (one, two, one & two))
        fp, fn = n_pred - tp, n_ref - tp
        union = tp + fp + fn
        result[key] = {
            "Dice": 2 * tp / (union + tp) if union else math.nan,
            "IoU": tp / union if union else math.nan,
            **{"FN": fn, "FP": fp, "TN": total - union, "TP": tp, "n_pred": n_pred, "n_ref": n_ref},
        }
    return result


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """nnU-Net's summary: foreground_mean, mean per class, metric_per_case; and the conventions in words."""
    mean = {}
    for key, first in cases[0]["metrics"].items():
        rows = [case["metrics"][key] for case in cases]
        mean[key] = {metric: _mean([row[metric] for row in rows]) for metric in first}
    foreground = {metric: _mean([m[metric] for m in mean.values()]) for metric in next(iter(mean.values()))}
    return {"conventions": CONVENTIONS, "foreground_mean": foreground, "mean": mean, "metric_per_case": cases}


def _mean(values: list[float]) -> float:
    present = [v for v in values if not math.isnan(v)]
    return sum(present) / len(present) if present else math.nan


def classes_of(pairs: Sequence[tuple[Path, Path]]) -> tuple[LabelSet, int]:
    """The classes found in the files, and their unit: 255 for masks of 0 and 255."""
    found = {str(p): np.unique(read_label(p, 0)) for pair in pairs for p in pair}
    values = sorted({int(v) for unique in found.values() for v in unique})
    if 255 in values and label_values(found) == [0, 255]:
        return classes(1), 255
    return classes(max(values[-1], 1)), 1


def _case(labels: LabelSet, unit: int, pair: tuple[Path, Path]) -> dict[str, Any]:
    truth, predicted = pair
    one, two = read_label(truth, 0), read_label(predicted, 0)
    check_pair(one[:, None], two, [truth], predicted)
    for path, label in ((truth, one), (predicted, two)):
        strange = np.setdiff1d(label // unit, labels.values)
        if strange.size:
            raise UserError(f"{path}: label values {summary(strange)}; expected only {summary(labels.values)}")
    metrics = scores(one // unit, two // unit, labels)
    return {"metrics": metrics, "prediction_file": str(predicted), "reference_file": str(truth)}


def write_csv(path: Path, summary: dict[str, Any]) -> None:
    """A row a case and class, whole or not at all."""
    cases = summary["metric_per_case"]
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "class", *next(iter(cases[0]["metrics"].values()))])
        for case in cases:
            for k, row in case["metrics"].items():
                figures = ["" if isinstance(v, float) and math.isnan(v) else v for v in row.values()]
                writer.writerow([Path(case["reference_file"]).name, k, *figures])


def table(summary: dict[str, Any]) -> str:
    """The means as a few lines of text."""
    cases = f"({len(summary['metric_per_case'])} case(s), convention {summary.get('convention', 'nnunet')})"
    if "pooled" in summary:
        return "\n".join([*(f"{name:<12}{value:>8.4f}" for name, value in summary["pooled"].items()), cases])
    metrics = [name for name in ("Dice", "IoU", "HD95") if name in summary["foreground_mean"]]
    names = {key: summary.get("names", {}).get(key, key) for key in summary["mean"]}
    width = max(8, *(len(name) + 1 for name in names.values()))
    lines = [f"{'class':<{width}}" + "".join(f"{m:>8}" for m in metrics) + f"   {cases}"]
    for key, row in [*summary["mean"].items(), ("mean", summary["foreground_mean"])]:
        lines.append(f"{names.get(key, key):<{width}}" + "".join(f"{row[m]:>8.4f}" for m in metrics))
    return "\n".join(lines)

"""Metric conventions of the 2D papers, by name: figures of one are never mixed with those of another.

``isic``: one confusion matrix over all pixels of all images (VM-UNet's evaluation of ISIC 2017 and 2018). ``synapse``
and ``acdc``: Dice and HD95 of each volume and class, then their mean (TransUNet's and MT-UNet's evaluation).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.evaluate import classes_of, paired
from vmamba.medical.labelset import LabelSet
from vmamba.medical.readers import check_pair, read_label
from vmamba.medical.runs import write_json

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
    tp = sum(int(np.count_nonzero(t & p)) for t, p in pairs)
    fp = sum(int(np.count_nonzero(~t & p)) for t, p in pairs)
    fn = sum(int(np.count_nonzero(t & ~p)) for t, p in pairs)
    tn = sum(t.size for t, _ in pairs) - tp - fp - fn
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


def _isic(pairs: Sequence[tuple[Path, Path]], _labels: LabelSet, _unit: int, progress: bool) -> dict[str, Any]:
    masks = [tuple(label > 0 for label in labels) for labels in _read(pairs, progress)]
    return {"conventions": WORDS["isic"], "pooled": pooled([(t, p) for t, p in masks]), "images": len(masks)}


def _volumes(pairs: Sequence[tuple[Path, Path]], labels: LabelSet, unit: int, progress: bool) -> dict[str, Any]:
    cases = []
    for (truth, predicted), (one, two) in zip(pairs, _read(pairs, progress), strict=True):
        one, two = one // unit, two // unit
        metrics = {
            key: volume_scores(np.isin(one, values), np.isin(two, values))
            for key, values in zip(labels.keys, labels.targets, strict=True)
        }
        cases.append({"metrics": metrics, "prediction_file": str(predicted), "reference_file": str(truth)})
    mean = {k: {m: float(np.mean([c["metrics"][k][m] for c in cases])) for m in ("Dice", "HD95")} for k in labels.keys}
    total = {m: float(np.mean([row[m] for row in mean.values()])) for m in ("Dice", "HD95")}
    return {"conventions": WORDS["volumes"], "foreground_mean": total, "mean": mean, "metric_per_case": cases}


def _read(pairs: Sequence[tuple[Path, Path]], progress: bool) -> Iterator[Pair]:
    for truth, predicted in tqdm(pairs, desc="evaluate", unit="case", disable=not progress):
        one, two = read_label(truth, 2), read_label(predicted, 2)
        check_pair(one[:, None], two, [truth], predicted)
        yield one, two


BY_NAME: dict[str, Callable[..., dict[str, Any]]] = {"isic": _isic, "synapse": _volumes, "acdc": _volumes}


def evaluate_by(
    name: str,
    truth: Path,
    predicted: Path,
    output: Path | None = None,
    *,
    labels: LabelSet | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The summary of two folders of masks by the convention ``name``; written to ``output`` if that is given."""
    if name not in BY_NAME:
        raise UserError(f"--convention {name}: unknown; choose from nnunet, {', '.join(BY_NAME)}")
    if output and output.exists() and not overwrite:
        raise UserError(f"{output}: exists; give another name or --overwrite")
    pairs = paired(truth, predicted)
    labels, unit = (labels, 1) if labels else classes_of(pairs)
    summary = BY_NAME[name](pairs, labels, unit, progress)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, {"convention": name, **summary})
    return summary

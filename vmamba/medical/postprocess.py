"""Post-processing by nnU-Net's rule: keep the largest component, of all foreground and of a class, where it helps."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import label as components
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.cases import LABELS, list_images
from vmamba.medical.evaluate import scores, summarise
from vmamba.medical.labelset import LabelSet, classes, label_set
from vmamba.medical.model_folder import write_plain
from vmamba.medical.raw import read_dataset_json
from vmamba.medical.readers import read_label, write_mask
from vmamba.medical.several import in_order
from vmamba.medical.written import say_kept
from vmamba.safety import only_writer

AXIS = 2
FILE = "postprocessing.json"


def keep_largest(label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """``label`` where the voxels of ``values`` outside of their largest component (diagonals touch) are background."""
    numbers, count = components(np.isin(label, values), np.ones((3,) * label.ndim))  # pyright: ignore
    if count < 2:
        return label
    largest = 1 + int(np.argmax(np.bincount(numbers.ravel())[1:]))
    return np.where((numbers > 0) & (numbers != largest), 0, label)


def decide(
    pairs: Sequence[tuple[Path, Path]], labels: LabelSet, progress: bool = True, threads: int = 1
) -> dict[str, Any]:
    """Which targets to reduce to their largest component, from (truth, prediction) files of the cross-validation.

    All foreground if that raises the mean Dice and lowers that of no target; then each target whose Dice rises.
    Returns ``steps``, lists of label values, and the mean Dice before and after. ``threads`` cases are worked on at a
    time; all are in memory.
    """
    read = partial(read_label, axis=AXIS)
    truths, predicted = (list(in_order(read, side, threads)) for side in zip(*pairs, strict=True))

    def dice(step: Sequence[int]) -> tuple[list[np.ndarray], dict[str, Any]]:
        def one(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
            reduced = keep_largest(pair[1], step) if step else pair[1]
            return reduced, {"metrics": scores(pair[0], reduced, labels)}

        maps, cases = zip(*in_order(one, zip(truths, predicted, strict=True), threads), strict=True)
        return list(maps), summarise(list(cases))

    _, start = dice(())
    now, steps = start, []
    candidates = [tuple(sorted({v for t in labels.targets for v in t})), *labels.targets]
    for number, values in enumerate(tqdm(candidates, desc="postprocess", unit="rule", disable=not progress)):
        if values in steps:
            continue
        maps, then = dice(values)
        if (_helps_all if number == 0 else _helps(labels.keys[number - 1]))(now, then):
            predicted, now = maps, then
            steps.append(values)
    figures = {key: {k: m["Dice"] for k, m in s["mean"].items()} for key, s in (("before", start), ("after", now))}
    return {
        "steps": [list(step) for step in steps],
        "Dice": figures,
        "rule": "keep the largest component of these labels",
    }


def decide_folders(
    truth: Path, predicted: Path, progress: bool = True, *, description: Path | None = None, threads: int = 1
) -> dict[str, Any]:
    """:func:`decide` for the masks of two folders; labels by a dataset.json, ``predicted``'s if it has one."""
    references, guesses = list_images(truth, LABELS), list_images(predicted, LABELS)
    pairs = [(references[name], path) for name, path in guesses.items() if name in references]
    if not pairs:
        raise UserError(f"{truth}: no mask of the same name as one of {predicted}")
    source = description or predicted / "dataset.json"
    if description or source.exists():
        labels = label_set(read_dataset_json(source), str(source))
    else:
        labels = classes(max(int(read_label(path, AXIS).max()) for pair in pairs for path in pair) or 1)
    return decide(pairs, labels, progress, threads)


def _helps_all(before: dict[str, Any], after: dict[str, Any]) -> bool:
    rises = after["foreground_mean"]["Dice"] > before["foreground_mean"]["Dice"]
    return rises and not any(after["mean"][k]["Dice"] < m["Dice"] for k, m in before["mean"].items())


def _helps(key: str) -> Any:
    return lambda before, after: after["mean"][key]["Dice"] > before["mean"][key]["Dice"]


def read_steps(path: Path) -> list[list[int]]:
    """The steps of a postprocessing.json; UserError if it is none."""
    steps = read_dataset_json(path).get("steps")
    if not isinstance(steps, list) or not all(
        isinstance(s, list) and all(isinstance(v, int) for v in s) for s in steps
    ):
        raise UserError(f"{path}: holds no steps; expected the file that vmamba medseg postprocess wrote")
    return steps


def apply(
    folder: Path, output: Path, steps: Sequence[Sequence[int]], *, overwrite: bool, progress: bool, threads: int = 1
) -> list[Path]:
    """Every mask of ``folder`` through the steps into ``output``, ``threads`` at a time.

    UserError if it holds masks made by other steps.
    """
    masks = list_images(folder, LABELS)
    if not masks:
        raise UserError(f"{folder}: holds no predictions")
    if folder.resolve() == output.resolve():
        raise UserError(f"{output}: is the folder of the predictions; give another output folder")
    with only_writer(output):
        kept = {path for path in masks.values() if not overwrite and (output / path.name).exists()}
        wanted = [list(step) for step in steps]
        if kept and (output / FILE).exists() and read_steps(output / FILE) != wanted:
            raise UserError(f"{output}: holds masks made by other steps; replace them with --overwrite")
        say_kept(output, [output / path.name for path in kept], len(masks), masks.values())
        write_plain(output / FILE, {"steps": wanted})
        todo = [path for path in masks.values() if path not in kept]
        with closing(in_order(partial(_one, output, steps), todo, threads)) as done:
            for _ in tqdm(done, desc="postprocess", total=len(todo), unit="case", disable=not progress):
                pass
        if (folder / "dataset.json").exists():
            write_plain(output / "dataset.json", read_dataset_json(folder / "dataset.json"))
    return [output / path.name for path in masks.values()]


def _one(output: Path, steps: Sequence[Sequence[int]], path: Path) -> None:
    label = read_label(path, AXIS)
    for step in steps:
        label = keep_largest(label, step)
    write_mask(output / path.name, label, path, AXIS)

"""Ensembles of models: the mean of the probabilities that several predictions kept."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.cases import LABELS, list_images
from vmamba.medical.labelset import LabelSet, label_set
from vmamba.medical.model_folder import write_plain
from vmamba.medical.raw import read_dataset_json
from vmamba.medical.readers import write_mask
from vmamba.medical.several import in_order
from vmamba.medical.written import complete, npz, save_probabilities, say_kept
from vmamba.safety import only_writer

AXIS = 2


def ensemble(
    folders: Sequence[Path], output: Path, *, keep: bool, overwrite: bool, progress: bool, threads: int = 1
) -> list[Path]:
    """Averages NAME.npz of all ``folders`` into ``output``/NAME.ext, ``threads`` cases at a time.

    UserError if a case or a file is missing.
    """
    if len(folders) < 2:
        raise UserError(
            f"{len(folders)} folder(s) to combine; expected at least two, predicted with --save_probabilities"
        )
    dataset = read_dataset_json(folders[0] / "dataset.json")
    labels = label_set(dataset, str(folders[0] / "dataset.json"))
    masks = list_images(folders[0], LABELS)
    if not masks:
        raise UserError(f"{folders[0]}: holds no predictions")
    for folder in folders:
        if output.resolve() == folder.resolve():
            raise UserError(f"{output}: is one of the folders to combine; give another output folder")
        for name in masks:
            if not (folder / f"{name}.npz").is_file():
                raise UserError(f"{folder / name}.npz: not there; predict with --save_probabilities")
    with only_writer(output):
        kept = {m for m in masks.values() if not overwrite and complete(output / m.name, keep)}
        sources = [folder / f"{name}.npz" for folder in folders for name in masks]
        say_kept(output, [output / m.name for m in kept], len(masks), sources)
        todo = [mask for mask in masks.values() if mask not in kept]
        with closing(in_order(partial(_one, folders, output, labels, keep), todo, threads)) as done:
            for _ in tqdm(done, desc="ensemble", total=len(todo), unit="case", disable=not progress):
                pass
        write_plain(output / "dataset.json", dataset)
    return [output / mask.name for mask in masks.values()]


def _one(folders: Sequence[Path], output: Path, labels: LabelSet, keep: bool, like: Path) -> None:
    files, target, total = [npz(folder / like.name) for folder in folders], output / like.name, None
    for path in files:
        maps = read_probabilities(path)
        if total is not None and total.shape != maps.shape:
            raise UserError(f"{path}: shape {maps.shape} differs from {files[0]}, {total.shape}")
        total = maps if total is None else total + maps
    assert total is not None
    mean = total / len(files)
    save_probabilities(target, mean if keep else None)
    label = labels.label_map(mean)
    stack = np.moveaxis(label, AXIS, 0) if label.ndim == 3 else label[None]
    write_mask(target, stack, like, AXIS)


def read_probabilities(path: Path) -> np.ndarray:
    """The array ``probabilities`` of an .npz, class first; UserError if it is none."""
    try:
        with np.load(path) as stored:
            return stored["probabilities"].astype(np.float32)
    except Exception as error:
        raise UserError(f"{path}: cannot be read as probabilities ({' '.join(str(error).split())[:100]})") from error

"""Prediction with the folds of a model folder: cases in nnU-Net's names in, label maps of the same geometry out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.export import decided, file_probabilities, save_case
from vmamba.medical.model_folder import ModelFolder, Trained, load_model, write_plain
from vmamba.medical.preprocess import Crop, preprocess_case
from vmamba.medical.raw import channel_files
from vmamba.medical.several import behind, in_order
from vmamba.medical.volume import read_volume
from vmamba.medical.window import Window, volume_logits
from vmamba.medical.written import complete, record, say_kept
from vmamba.safety import only_writer


@dataclass
class Wish:
    """What is written, and which share of the cases: those whose number modulo ``parts`` is ``part``.

    ``readers`` cases are read and preprocessed while others are predicted, ``writers`` are written; 0: in turn.
    """

    probabilities: bool = False
    overwrite: bool = False
    parts: int = 1
    part: int = 0
    progress: bool = True
    readers: int = 1
    writers: int = 1


def load_folds(
    model: ModelFolder, folds: Sequence[str], checkpoint: str, device: torch.device, trust: bool
) -> list[Trained]:
    """The networks of the folds, by default of all that were trained; UserError if one is missing."""
    chosen = list(folds) or model.folds()
    if not chosen:
        raise UserError(f"{model.folder}: no fold has been trained; run vmamba medseg train")
    trained = [load_model(model, model.checkpoint(fold, checkpoint), trust=trust) for fold in chosen]
    for one in trained:
        one.network.to(device)
    return trained


def predict_folder(
    source: Path, output: Path, model: ModelFolder, trained: Sequence[Trained], window: Window, wish: Wish
) -> list[Path]:
    """Predicts NAME_0000.ext ... of ``source`` into ``output``/NAME.ext; existing masks stay unless ``overwrite``.

    A mask without the probabilities that are wanted counts as not there.
    """
    if not 0 <= wish.part < wish.parts:
        raise UserError(
            f"-part_id {wish.part} of -num_parts {wish.parts}: expected a number from 0 to {wish.parts - 1}"
        )
    groups = sorted(channel_files(source, model.channels, model.ending).items())[wish.part :: wish.parts]
    if not groups:
        raise UserError(f"{source}: no case; expected NAME_0000{model.ending}")
    if source.resolve() == output.resolve():
        raise UserError(f"{output}: is the folder of the images; give another output folder")
    targets = [output / f"{name}{model.ending}" for name, _ in groups]
    lock = output if wish.parts == 1 else output / f"part_{wish.part}"
    files = [one.name for one in trained]
    how = {"model": model.folder.name, "checkpoints": files, "mirroring": window.mirror, "step_size": window.step}
    with only_writer(lock):
        for name, data in (("plans.json", model.plans), ("dataset.json", model.dataset)):
            write_plain(output / name, data)
        kept = {t for t in targets if not wish.overwrite and complete(t, wish.probabilities)}
        record(output, kept, how)
        todo = [(files, t) for (_, files), t in zip(groups, targets, strict=True) if t not in kept]
        say_kept(output, kept, len(targets), [one.source for one in trained])
        bar = tqdm(todo, desc="predict", unit="case", disable=not wish.progress)
        prepared = _prepared(model, [files for files, _ in todo], wish.readers)
        with behind(wish.writers) as begin:
            for (files, target), (data, crop) in zip(bar, prepared, strict=True):
                logits = volume_logits(trained, torch.from_numpy(data), window)
                maps = file_probabilities(logits, crop, model.labels, model.plans, model.configuration)
                begin(save_case, target, *decided(maps, model.labels, wish.probabilities), files[0])
    return targets


def _prepared(
    model: ModelFolder, cases: Sequence[Sequence[Path]], readers: int = 1
) -> Iterator[tuple[np.ndarray, Crop]]:
    """The cases as the networks see them; so many are read while one before them is predicted."""

    def read(files: Sequence[Path]) -> tuple[np.ndarray, Crop]:
        data, _, crop = preprocess_case(read_volume(files, model.channels), None, model.plans, model.configuration)
        return data, crop

    return in_order(read, cases, readers, readers)

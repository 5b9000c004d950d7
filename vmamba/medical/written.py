"""A folder of masks: the probabilities beside them, and what an earlier run left that is complete or out of date."""

import json
from collections.abc import Collection, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vmamba.errors import UserError
from vmamba.medical.cases import LABELS, list_images, stem
from vmamba.medical.model_folder import write_plain
from vmamba.safety import replacing

PREDICTED = "predict_from_raw_data_args.json"  # nnU-Net's name


def npz(mask: Path) -> Path:
    """Where the probabilities of a mask lie: NAME.npz beside it."""
    return mask.with_name(f"{stem(mask)}.npz")


def save_probabilities(mask: Path, probabilities: np.ndarray | None) -> None:
    """Writes them beside a mask, key ``probabilities``; None removes those of an earlier mask."""
    if probabilities is None:
        npz(mask).unlink(missing_ok=True)
        return
    with replacing(npz(mask)) as partial:
        np.savez_compressed(partial, probabilities=probabilities)


def complete(mask: Path, probabilities: bool) -> bool:
    """Whether a mask is there, and its probabilities if they are wanted."""
    return mask.exists() and (not probabilities or npz(mask).exists())


def say_kept(output: Path, kept: Iterable[Path], count: int, sources: Iterable[Path]) -> None:
    """One line if masks of an earlier run are ``kept`` of ``count``; it tells those older than one of ``sources``."""
    masks = list(kept)
    if not masks:
        return
    newest = max((path.stat().st_mtime for path in sources if path.exists()), default=0.0)
    old = sum(path.stat().st_mtime < newest for path in masks)
    note = f"; {old} of them made before their sources changed" if old else ""
    print(f"{output}: {len(masks)} of {count} already predicted, kept{note} (--overwrite replaces them)")


def drop_masks(folder: Path, keep: Container[str] = ()) -> None:
    """Removes summary.json, and masks with their probabilities but for the names to ``keep``: they are out of date."""
    if folder.is_dir():
        (folder / "summary.json").unlink(missing_ok=True)
        for name, mask in list_images(folder, LABELS).items():
            if name not in keep:
                npz(mask).unlink(missing_ok=True)
                mask.unlink(missing_ok=True)


def record(output: Path, kept: Collection[Path], how: Mapping[str, Any]) -> None:
    """Writes how the masks of a folder are predicted; UserError if those to be ``kept`` were predicted otherwise."""
    path = output / PREDICTED
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    other = {name: found[name] for name, value in how.items() if name in found and found[name] != value}
    if kept and other:
        differences = ", ".join(f"{name} {value}, now {how[name]}" for name, value in other.items())
        raise UserError(f"{output}: holds masks predicted otherwise ({differences}); replace them with --overwrite")
    write_plain(path, how)

"""Cross-validation: nnU-Net's splits_final.json, written once and respected if it is there."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import KFold

from vmamba.errors import UserError
from vmamba.safety import replacing

SEED = 12345
FOLDS = 5


def read_splits(path: Path, names: Sequence[str], *, write: bool = True) -> list[dict[str, list[str]]]:
    """The splits in ``path``; if it is not there, 5 folds by nnU-Net's seed, which are written. UserError if wrong."""
    if not path.exists():
        splits = make_splits(sorted(names))
        if write:
            with replacing(path) as partial:
                partial.write_text(json.dumps(splits, indent=4, ensure_ascii=False), encoding="utf-8")
        return splits
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        used = {name for split in splits for part in ("train", "val") for name in split[part]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: expected a list of {{"train": [...], "val": [...]}} ({error})') from error
    if unknown := sorted(used - set(names)):
        raise UserError(f"{path}: names {unknown[0]!r}, which is no case of the data set ({len(unknown)} such)")
    return splits


def make_splits(names: list[str]) -> list[dict[str, list[str]]]:
    """Shuffled folds of the sorted names; UserError if there are fewer than 5 cases."""
    if len(names) < FOLDS:
        raise UserError(f"{len(names)} case(s) make no {FOLDS} folds; write splits_final.json, or train fold all")
    folds = KFold(FOLDS, shuffle=True, random_state=SEED).split(np.arange(len(names)))
    return [{"train": [names[i] for i in a], "val": [names[i] for i in b]} for a, b in folds]


def fold_cases(path: Path, names: Sequence[str], fold: str, *, write: bool = True) -> tuple[list[str], list[str]]:
    """(training, validation) cases of fold ``all`` or a number; beyond the list 80 : 20, drawn from the number.

    Without ``write`` a list that is not there is not written either.
    """
    if fold == "all":
        return sorted(names), sorted(names)
    if not fold.isdecimal():
        raise UserError(f"fold {fold!r}: expected 0, 1, 2, 3, 4 or all")
    splits, number = read_splits(path, names, write=write), int(fold)
    if number < len(splits):
        return splits[number]["train"], splits[number]["val"]
    if len(names) < 2:
        raise UserError(f"fold {fold}: {path} has {len(splits)}, and one case cannot be split")
    draw = np.random.RandomState(SEED + number)
    chosen = set(draw.choice(len(names), int(len(names) * 0.8), replace=False).tolist())
    ordered = sorted(names)
    return [n for i, n in enumerate(ordered) if i in chosen], [n for i, n in enumerate(ordered) if i not in chosen]

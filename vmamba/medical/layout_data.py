"""A layout's cases as slices in memory: the published lists, normalised and at the size of the training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.cases import Case
from vmamba.medical.data import Stack
from vmamba.medical.layout import Layout, Parts, group
from vmamba.medical.recipes import RECIPES
from vmamba.medical.resize import RESIZERS
from vmamba.medical.spec import Settings
from vmamba.medical.splits import split_cases
from vmamba.medical.transforms import normalise


@dataclass
class Found:
    """What the data say: entries of the spec, and notes worth printing."""

    spec: dict
    notes: list[str]


def resized(stacks: Iterable[Stack], size: Sequence[int] | None, how: str) -> None:
    """Brings images and labels of ``stacks``, in place, to ``size`` by a way of :data:`RESIZERS`; None: as they are."""
    if size:
        for stack in (s for s in stacks if s.image.shape[2:] != tuple(size)):
            stack.image = RESIZERS[how].image(stack.image, size)
            stack.label = RESIZERS[how].label(stack.label, size)


def read_layout(layout: Layout, settings: Settings) -> tuple[tuple[list[Stack], list[Stack]], dict[str, list], Found]:
    """((train, val) slices, names of the cases by part, what was found) of the folder ``settings.data``."""
    folder = Path(str(settings.data))
    chosen, note = choose(layout.parts(folder), settings, folder)
    train, val = (_read(layout, cases, settings) for cases in chosen)
    counts = [sum(len(stack.image) for stack in part) for part in (train, val)]
    notes = [f"{folder}: layout of {layout.name}; {counts[0]} slice(s) to train and {counts[1]} to validate; {note}"]
    spec = {"values": list(layout.values), "classes": list(layout.classes)}
    names = {part: [case.name for case in cases] for part, cases in zip(("train", "val"), chosen, strict=True)}
    return (train, val), names, Found(spec, notes)


def choose(parts: Parts, settings: Settings, folder: Path) -> tuple[tuple[list[Case], list[Case]], str]:
    """(train, val) cases and a word on them: the published validation list, or scans held out of the training list.

    Where there is no such list and ``val_fraction`` is 0, the test volumes are watched, as the papers' code does it.
    """
    if "val" in parts:
        return (parts["train"], parts["val"]), "published lists"
    if not settings.val_fraction:
        if RECIPES[settings.recipe].best == "val_dice":
            advice = "--val-fraction 0.2 holds out scans of the training list"
            raise UserError(f"{folder}: has no validation list, and its test volumes must not choose; {advice}")
        word = "there is no list to validate: the test volumes are watched, choose nothing"
        return (parts["train"], parts["test"]), word
    scans = sorted({group(case.name) for case in parts["train"]})
    if len(scans) < 2:
        raise UserError(f"{folder}: the training list has slices of {scans[0]} only; nothing can be held out")
    kept, _ = split_cases(scans, settings.val_fraction, settings.seed)
    pair = [[case for case in parts["train"] if (group(case.name) in kept) is wanted] for wanted in (True, False)]
    return (pair[0], pair[1]), f"{len(scans) - len(kept)} of {len(scans)} scans held out of the training list"


def _read(layout: Layout, cases: Sequence[Case], settings: Settings) -> list[Stack]:
    stacks, how = [], RECIPES[settings.recipe].resize
    for case in tqdm(cases, desc=f"read {layout.name}", unit="file", leave=False, disable=len(cases) < 100):
        image, label = layout.read(case)
        stack = Stack(case.name, normalise(image, settings.normalisation), label)
        resized([stack], settings.size, how)
        if stacks and stack.image.shape[1] != stacks[0].image.shape[1]:
            counts = f"{stack.image.shape[1]} channel(s), but {cases[0].images[0].name} has {stacks[0].image.shape[1]}"
            raise UserError(f"{case.images[0]}: {counts}; expected the same channels everywhere")
        stacks.append(stack)
    return stacks

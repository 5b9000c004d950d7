"""From settings to training data: reads every case, finds the classes, splits, fixes the patch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmamba.errors import UserError
from vmamba.medical import mri
from vmamba.medical.cases import has_suffix, pair_cases
from vmamba.medical.data import Slices, Stack
from vmamba.medical.labels import label_values, summary, to_classes
from vmamba.medical.layout_data import Found, read_layout, resized
from vmamba.medical.layouts import LAYOUTS, find_layout
from vmamba.medical.readers import check_pair, read_image, read_label
from vmamba.medical.recipes import RECIPES
from vmamba.medical.spec import Settings, Spec
from vmamba.medical.splits import split_cases, split_slices
from vmamba.medical.transforms import MULTIPLE, Augment, dataset_statistics, divisible, normalise

LARGEST_PATCH = 512
GAP = 3


@dataclass
class Prepared:
    """What the trainer needs: slices, spec, the split for the record, and notes worth printing."""

    train: Slices
    val: Slices
    spec: Spec
    split: dict[str, list]
    notes: list[str]


def prepare(settings: Settings) -> Prepared:
    """Reads the data set of ``settings`` (the embedded MRI without one) into memory."""
    if settings.data is None:
        stacks, split, found = _embedded(settings)
    elif layout := find_layout(Path(settings.data)):
        stacks, split, found = read_layout(layout, settings)
    else:
        stacks, split, found = _folder(settings)
    train, val = stacks
    recipe = RECIPES[settings.recipe]
    if recipe.sigmoid and len(found.spec["values"]) > 2:
        raise UserError(f"--recipe {settings.recipe}: is for two classes, the data have {len(found.spec['values'])}")
    resized((*train, *val), settings.size, recipe.resize)
    statistics = dataset_statistics([s.image for s in train]) if settings.normalisation == "dataset" else None
    for stack in (*train, *val):
        stack.image = normalise(stack.image, "none", statistics)
    patch = fit_patch(settings.patch, [s.image.shape[2:] for s in train])
    spec = Spec(
        model=settings.model,
        network=settings.network_options(),
        channels=train[0].image.shape[1],
        patch=list(patch),
        axis=settings.axis if settings.data else mri.AXIS,
        size=settings.size,
        resize=recipe.resize,
        sigmoid=recipe.sigmoid,
        normalisation=settings.normalisation,
        statistics=statistics,
        **found.spec,
    )
    augment = Augment(patch, settings.augmentation)
    return Prepared(Slices(train, augment, settings.seed), Slices(val), spec, split, found.notes)


def fit_patch(asked: list[int] | None, sizes: list[tuple[int, ...]]) -> tuple[int, int]:
    """The training patch: as asked, else the largest slice, up to 512, in multiples of 32."""
    if asked:
        h, w = asked if len(asked) == 2 else asked * 2
        if h % MULTIPLE or w % MULTIPLE or min(h, w) < MULTIPLE:
            raise UserError(
                f"--patch {h} {w}: expected multiples of {MULTIPLE}, such as {divisible(h, w)[0]} {divisible(h, w)[1]}"
            )
        return h, w
    h, w = divisible(max(s[0] for s in sizes), max(s[1] for s in sizes))
    return min(h, LARGEST_PATCH), min(w, LARGEST_PATCH)


def _embedded(settings: Settings) -> tuple[tuple[list[Stack], list[Stack]], dict[str, list], Found]:
    image, label = (np.asanyarray(v.dataobj) for v in mri.load_mri())
    blocks = mri.mri_split(label)
    slices, classes = np.moveaxis(image, mri.AXIS, 0)[:, None].astype(np.float32), np.moveaxis(label, mri.AXIS, 0)
    train, val = (
        [Stack("mni152", normalise(slices[blocks[b]], settings.normalisation), classes[blocks[b]])]
        for b in ("train", "val")
    )
    notes = [
        f"no --data: the MRI in nilearn's wheel, 1 mm axial slices: {len(blocks['train'])} to train, "
        f"{len(blocks['val'])} to validate, {len(blocks['test'])} held out, blocks {mri.GAP} mm apart"
    ]
    spec = {"values": [0, 1, 2], "classes": mri.CLASSES}
    return (train, val), {k: v.tolist() for k, v in blocks.items()}, Found(spec, notes)


def _folder(settings: Settings) -> tuple[tuple[list[Stack], list[Stack]], dict[str, list], Found]:
    folder = Path(str(settings.data))
    if folder.is_dir() and not any((folder / name).is_dir() for name in ("images", "labels")):
        raise UserError(f"{folder}: no images/ and labels/ in it, nor the layout of {', '.join(LAYOUTS)}")
    cases = pair_cases(folder)
    images, labels = {}, {}
    for case in cases:
        assert case.label is not None
        raw, labels[case.name] = read_image(case.images, settings.axis), read_label(case.label, settings.axis)
        check_pair(raw, labels[case.name], case.images, case.label)
        images[case.name] = normalise(raw, settings.normalisation)
        first = images[cases[0].name].shape[1]
        if raw.shape[1] != first:
            raise UserError(
                f"{case.images[0]}: {raw.shape[1]} channel(s), but {cases[0].images[0].name} has {first}; "
                "expected the same channels everywhere"
            )
    files = {str(case.label): np.unique(labels[case.name]) for case in cases}
    values = label_values(files)
    stacks = [Stack(c.name, images[c.name], to_classes(labels[c.name], values, str(c.label))) for c in cases]
    pair, split = _split(stacks, settings, folder)
    suffix = has_suffix(cases)
    names = ["background", *(f"class {v}" for v in values[1:])] if values != [0, 255] else ["background", "foreground"]
    spec = {"values": values, "classes": names, "files_per_case": len(cases[0].images), "suffix": suffix}
    slices = [sum(len(s.image) for s in part) for part in pair]
    notes = [f"{folder}: {len(cases)} case(s), {slices[0]} slice(s) to train and {slices[1]} to validate"]
    binary = "masks of 0 and 255: read as 2 classes, background and foreground"
    notes.append(binary if values == [0, 255] else f"{len(values)} classes: label values {summary(values)}")
    return pair, split, Found(spec, notes)


def _split(
    stacks: list[Stack], settings: Settings, folder: Path
) -> tuple[tuple[list[Stack], list[Stack]], dict[str, list]]:
    if not settings.val_fraction:
        raise UserError("--val-fraction 0: expected a share above 0; only the papers' layouts have their own lists")
    if len(stacks) > 1:
        train, val = split_cases([s.name for s in stacks], settings.val_fraction, settings.seed)
        chosen = tuple([s for s in stacks if s.name in names] for names in (train, val))
        return (chosen[0], chosen[1]), {"train": train, "val": val}
    only = stacks[0]
    if len(only.image) == 1:
        raise UserError(f"{folder}: one image only ({only.name}); expected at least two, one of them to validate")
    start = 0.5 - settings.val_fraction / 2
    blocks = split_slices(np.arange(len(only.image)), {"val": (start, start + settings.val_fraction)}, GAP)
    train, val = ([Stack(only.name, only.image[b], only.label[b])] for b in (blocks["train"], blocks["val"]))
    return (train, val), {k: v.tolist() for k, v in blocks.items()}

"""Synapse as TransUNet prepared it and ACDC as MT-UNet did: lists of names, slices to train, volumes to test."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from vmamba.errors import UserError
from vmamba.medical.cases import ARRAYS, Case, ending, list_images, stem
from vmamba.medical.layout import Layout, Parts, missing


class _Place(NamedTuple):
    """Where a part lies: its folder (or another name of it) and its list."""

    folders: tuple[str, ...]
    names: str


_SYNAPSE = {
    "train": _Place(("train_npz", "train_slice"), "train"),
    "test": _Place(("test_vol_h5", "test_vol"), "test_vol"),
}
_ACDC = {part: _Place((part,), part) for part in ("train", "valid", "test")}


def _find(lists: str, places: dict[str, _Place], folder: Path) -> Parts:
    where = next((p for p in (folder / "lists" / lists, folder / lists) if p.is_dir()), None)
    if where is None:
        raise UserError(f"{folder / 'lists' / lists}: no such folder; the lists come with the preparation's code")
    parts = {}
    for part, place in places.items():
        files = next((folder / f for f in place.folders if (folder / f).is_dir()), None)
        if files is None:
            raise UserError(f"{folder / place.folders[0]}: no such folder")
        parts["val" if part == "valid" else part] = _listed(where / f"{place.names}.txt", files)
    return parts


def _listed(names: Path, folder: Path) -> list[Case]:
    if not names.is_file():
        raise UserError(f"{names}: no such file; expected one name a line")
    wanted = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not wanted:
        raise UserError(f"{names}: is empty; expected one name a line")
    wanted = [stem(Path(line)) if ending(Path(line), ARRAYS) else line for line in wanted]
    found = list_images(folder, ARRAYS)
    if lost := [str(folder / name) for name in wanted if name not in found]:
        raise missing(lost, f"not there, but in {names}")
    return [Case(name, (found[name],), found[name]) for name in wanted]


SYNAPSE = Layout(
    name="Synapse",
    words="lists/lists_Synapse/train.txt and test_vol.txt, train_npz/CASE_sliceNNN.npz, test_vol_h5/CASE.npy.h5, both "
    "with the arrays image and label",
    classes=(
        *("background", "aorta", "gallbladder", "left kidney", "right kidney"),
        *("liver", "pancreas", "spleen", "stomach"),
    ),
    values=tuple(range(9)),
    marks=("lists/lists_Synapse", "lists_Synapse", "train_npz", "test_vol_h5"),
    find=partial(_find, "lists_Synapse", _SYNAPSE),
    convention="synapse",
    recipe="vmunet-synapse",
)
ACDC = Layout(
    name="ACDC",
    words="lists_ACDC/train.txt, valid.txt and test.txt, train/ and valid/case_NNN_sliceED_K.npz, "
    "test/case_NNN_volume_ED.npz, all with the arrays img and label",
    classes=("background", "right ventricle", "myocardium", "left ventricle"),
    values=tuple(range(4)),
    marks=("lists_ACDC", "lists/lists_ACDC", "train/*_slice*.npz", "test/*_volume_*.npz"),
    find=partial(_find, "lists_ACDC", _ACDC),
    convention="acdc",
    recipe="msvm-acdc",
)

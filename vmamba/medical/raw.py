"""nnU-Net's folders: data sets under nnUNet_raw by name or number, what their dataset.json says, and their cases."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.medical.cases import LABELS, Case, list_images
from vmamba.medical.labelset import LabelSet, label_set

_NAME = re.compile(r"Dataset(\d{3})_.+")
_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Places:
    """The three folders of nnU-Net."""

    raw: Path
    preprocessed: Path
    results: Path

    @classmethod
    def find(cls, root: Path | None = None) -> "Places":
        """ROOT/nnUNet_raw and so on, or the environment variables of these names."""
        found = []
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            path = root / name if root else os.environ.get(name)
            if not path:
                raise UserError(f"{name} is not set; export {name}=FOLDER, or give --root FOLDER with {name}/ inside")
            found.append(Path(path))
        return cls(*found)


@dataclass(frozen=True)
class RawDataset:
    """One data set: DatasetNNN_NAME with dataset.json, imagesTr/ and labelsTr/."""

    folder: Path
    json: dict[str, Any]
    labels: LabelSet
    channels: tuple[str, ...]
    ending: str

    @property
    def name(self) -> str:
        """DatasetNNN_NAME"""
        return self.folder.name

    def cases(self) -> list[Case]:
        """Training cases by name, each with all its channels and its label; UserError if a file is missing."""
        labels = list_images(self.folder / "labelsTr", LABELS)
        groups = channel_files(self.folder / "imagesTr", len(self.channels), self.ending)
        for name in sorted(set(groups) ^ set(labels)):
            if name in groups:
                raise UserError(f"{groups[name][0]}: image without label; expected {self.folder / 'labelsTr' / name}.*")
            raise UserError(f"{labels[name]}: label without image; expected {name}_0000{self.ending} in imagesTr")
        if not groups:
            raise UserError(f"{self.folder / 'imagesTr'}: no case; expected NAME_0000{self.ending}")
        return [Case(name, paths, labels[name]) for name, paths in sorted(groups.items())]


def find_dataset(places: Places, which: str) -> RawDataset:
    """A data set by its name or number; UserError lists those that exist."""
    return read_dataset(places.raw / dataset_name(places.raw, which))


def dataset_name(folder: Path, which: str) -> str:
    """DatasetNNN_NAME of a name or a number, among the sub-folders of ``folder``."""
    known = (
        sorted(p.name for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)) if folder.is_dir() else []
    )
    number = f"Dataset{int(which):03d}_" if which.isdigit() else None
    found = [name for name in known if name == which or (number and name.startswith(number))]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"data set {which}: {' and '.join(found)} in {folder} have this number; give the whole name")
    raise UserError(f"data set {which!r}: not in {folder}; there {'are ' + ', '.join(known) if known else 'is none'}")


def read_dataset(folder: Path) -> RawDataset:
    """The data set in ``folder``; UserError for a dataset.json that is missing or wrong."""
    path = folder / "dataset.json"
    data = read_dataset_json(path)
    ending = data.get("file_ending")
    if ending not in LABELS:
        raise UserError(f"{path}: file_ending {ending!r}; this reader knows {', '.join(LABELS)}; convert the files")
    channels = data.get("channel_names", data.get("modality"))
    if not channels:
        raise UserError(f'{path}: no channel_names; expected {{"0": "CT"}} or the like')
    return RawDataset(folder, data, label_set(data, str(path)), tuple(channels.values()), ending)


def read_dataset_json(path: Path) -> dict[str, Any]:
    """The dictionary in a dataset.json; UserError if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected nnU-Net's description of the data set") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}; expected a dictionary")
    return data


def channel_files(folder: Path, channels: int, ending: str) -> dict[str, tuple[Path, ...]]:
    """``{case: its channel files}`` of NAME_0000, NAME_0001 ...; one RGB picture may hold three channels."""
    groups: dict[str, dict[int, Path]] = {}
    for name, path in list_images(folder, (ending,)).items():
        match = _CHANNEL.fullmatch(name)
        if not match:
            raise UserError(f"{path}: no channel number in its name; expected {name}_0000{ending}")
        groups.setdefault(match[1], {})[int(match[2])] = path
    pictures = not ending.startswith(".nii")
    for name, files in groups.items():
        one_file = pictures and list(files) == [0]
        if sorted(files) != list(range(channels)) and not one_file:
            missing = [f"{name}_{i:04d}{ending}" for i in range(channels) if i not in files]
            wrong = f"{', '.join(missing)} is missing" if missing else f"{len(files)} files"
            raise UserError(f"{folder}: case {name}: {wrong}; dataset.json names {channels} channel(s)")
    return {name: tuple(files[i] for i in sorted(files)) for name, files in groups.items()}

"""What lies where in nnUNet_preprocessed: plans written once, and the pieces of a training found again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.medical.fingerprint import fingerprint
from vmamba.medical.model_folder import folder_name, write_plain
from vmamba.medical.plan import Configuration, configuration, make_plans
from vmamba.medical.raw import Places, RawDataset, dataset_name, find_dataset, read_dataset_json
from vmamba.safety import only_writer

PLANS = "nnUNetPlans"
FINGERPRINT = "dataset_fingerprint.json"


@dataclass
class Job:
    """One configuration of a planned data set, ready to preprocess and train."""

    dataset: RawDataset
    plans: dict[str, Any]
    configuration: Configuration
    preprocessed: Path
    folder: Path

    @property
    def stored(self) -> Path:
        """Folder of the preprocessed cases; nnU-Net's own, in another format, lies beside it."""
        return self.preprocessed / f"vmamba_{self.configuration.identifier}"


def write_plans(
    places: Places,
    which: str,
    name: str,
    memory: float,
    *,
    overwrite: bool,
    progress: bool,
    threads: int = 1,
    spacing: Sequence[float] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Checks every case and writes fingerprint and plans; an existing plans file is kept unless ``overwrite``.

    ``threads`` cases are read at a time; ``memory`` and ``spacing`` are those of :func:`make_plans`.
    """
    dataset = find_dataset(places, which)
    folder = places.preprocessed / dataset.name
    path = folder / f"{name}.json"
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; use it, give another name with -p, or replace it with --overwrite")
    found = fingerprint(dataset, progress, threads)
    plans = make_plans(dataset, found, name, memory, spacing)
    with only_writer(folder):
        write_plain(folder / "dataset.json", dataset.json)
        write_plain(folder / FINGERPRINT, found)
        write_plain(path, plans)
    return path, plans


def open_job(places: Places, which: str, config: str, trainer: str, name: str) -> Job:
    """A planned configuration by the data set's name or number; UserError says what has to run first."""
    dataset = find_dataset(places, which)
    path = _plans(places, dataset, which, name)
    plans = read_dataset_json(path)
    c = configuration(plans, config, str(path))
    return Job(dataset, plans, c, path.parent, places.results / dataset.name / folder_name(trainer, name, config))


def open_plans(places: Places, which: str, configs: Sequence[str] | None, name: str) -> list[Job]:
    """The named configurations of a data set's plans, by default all that this program trains."""
    if configs is None:
        known = read_dataset_json(_plans(places, find_dataset(places, which), which, name))["configurations"]
        configs = [key for key in ("2d", "3d_fullres") if key in known]
    return [open_job(places, which, config, "", name) for config in configs]


def trained_folder(places: Places, which: str, config: str, trainer: str, name: str) -> Path:
    """TRAINER__PLANS__CONFIG in nnUNet_results; UserError lists what is there instead."""
    dataset = places.results / dataset_name(places.results, which)
    folder = dataset / folder_name(trainer, name, config)
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in dataset.iterdir() if "__" in p.name)) or "nothing"
        raise UserError(f"{folder}: not trained; in {dataset}: {there}")
    return folder


def _plans(places: Places, dataset: RawDataset, which: str, name: str) -> Path:
    path = places.preprocessed / dataset.name / f"{name}.json"
    if not path.exists():
        raise UserError(f"{path}: no such plans; run vmamba medseg plan -d {which}")
    return path


def describe(plans: dict[str, Any], source: str) -> str:
    """The plans as a few lines of text."""
    lines = [f"{plans['dataset_name']}: axes {plans['transpose_forward']}, plans {plans['plans_name']}"]
    for key in plans["configurations"]:
        c = configuration(plans, key, source)
        patch, spacing = " x ".join(map(str, c.patch)), " x ".join(f"{s:g}" for s in c.spacing)
        lines.append(f"{key:<12} patch {patch}, batch {c.batch}, voxels of {spacing} mm, {len(c.strides)} stages")
    return "\n".join(lines)

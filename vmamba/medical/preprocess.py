"""A case as the network sees it: axes in the plans' order, cropped to what is not 0, normalised, resampled."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.cases import Case
from vmamba.medical.fingerprint import inside
from vmamba.medical.plan import Configuration
from vmamba.medical.raw import RawDataset
from vmamba.medical.resample import coarse_axis, resample, resample_labels, resampled_shape
from vmamba.medical.several import in_order
from vmamba.medical.volume import Volume, read_case
from vmamba.safety import only_writer, replacing

OUTSIDE = -1  # label of the zeros around the object, and of what lies beyond the image
LOCATIONS = 10_000  # voxels remembered per label, from which training picks the centre of a patch


@dataclass(frozen=True)
class Crop:
    """How a preprocessed case lies in its file: sizes and spacing in the plans' order of axes."""

    whole: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    spacing: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the box in the file's voxels."""
        return tuple(b - a for a, b in self.box)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index."""
        return tuple(slice(a, b) for a, b in self.box)


def preprocess_case(
    image: Volume, label: np.ndarray | None, plans: dict[str, Any], c: Configuration
) -> tuple[np.ndarray, np.ndarray | None, Crop]:
    """(channels (c, z, y, x) float32, label (z, y, x) int16 or None, where it lies), by the plans."""
    order = plans["transpose_forward"]
    data = image.data.transpose(0, *(i + 1 for i in order))
    spacing = [image.spacing[i] for i in order]
    mask, box = inside(data)
    crop = Crop(data.shape[1:], tuple((s.start, s.stop) for s in box), tuple(spacing))
    data, mask = data[(slice(None), *box)], mask[box]
    if label is not None:
        label = np.array(label.transpose(order)[box])
        label[(label == 0) & ~mask] = OUTSIDE
    properties = plans["foreground_intensity_properties_per_channel"]
    rows = zip(data, c.schemes, c.masked, strict=True)
    data = np.stack([_normalise(x, s, mask if m else None, properties[str(i)]) for i, (x, s, m) in enumerate(rows)])
    target = [*spacing[: 3 - c.axes], *c.spacing]
    shape, coarse = resampled_shape(data.shape[1:], spacing, target), coarse_axis(spacing, target)
    if label is not None:
        label = resample_labels(label, shape, coarse)
    return resample(data, shape, coarse, 3), label, crop


def _normalise(x: np.ndarray, scheme: str, mask: np.ndarray | None, properties: dict[str, float]) -> np.ndarray:
    if scheme not in NORMALISATIONS:
        raise UserError(f"plans name the normalisation {scheme!r}; this program has {', '.join(NORMALISATIONS)}")
    return NORMALISATIONS[scheme](x, mask, properties).astype(np.float32)


def _zscore(x: np.ndarray, mask: np.ndarray | None, _: dict[str, float]) -> np.ndarray:
    if mask is None:
        return (x - x.mean()) / max(x.std(), 1e-8)
    out = x.copy()
    out[mask] = (x[mask] - x[mask].mean()) / max(x[mask].std(), 1e-8)
    return out


def _ct(x: np.ndarray, _: np.ndarray | None, properties: dict[str, float]) -> np.ndarray:
    clipped = np.clip(x, properties["percentile_00_5"], properties["percentile_99_5"])
    return (clipped - properties["mean"]) / max(properties["std"], 1e-8)


NORMALISATIONS = {
    "ZScoreNormalization": _zscore,
    "CTNormalization": _ct,
    "NoNormalization": lambda x, _mask, _properties: x,
    "RescaleTo01Normalization": lambda x, _mask, _properties: (x - x.min()) / max(np.ptp(x), 1e-8),
    "RGBTo01Normalization": lambda x, _mask, _properties: x / 255.0,
}


def preprocess(
    dataset: RawDataset,
    plans: dict[str, Any],
    c: Configuration,
    folder: Path,
    *,
    overwrite: bool,
    progress: bool,
    threads: int = 1,
) -> list[str]:
    """Every training case into ``folder``; those made of the same files by the same rules stay unless ``overwrite``.

    ``threads`` cases are worked on at a time. Returns the names of all.
    """
    cases, how = dataset.cases(), rules(plans, c)

    def make(case: Case) -> None:
        made = {"how": how, "files": _files([*case.images, *filter(None, [case.label])])}
        if overwrite or _made(folder, case.name) != made:
            data, label, crop = preprocess_case(*read_case(case, len(dataset.channels), dataset.labels), plans, c)
            assert label is not None
            store(folder, case.name, data, label, crop, made)

    with only_writer(folder), closing(in_order(make, cases, threads)) as done:
        for _ in tqdm(done, desc=f"preprocess {c.name}", total=len(cases), unit="case", disable=not progress):
            pass
    return [case.name for case in cases]


def rules(plans: dict[str, Any], c: Configuration) -> dict[str, Any]:
    """What decides how a case is preprocessed, as JSON gives it back."""
    properties = plans["foreground_intensity_properties_per_channel"]
    used = [properties[str(i)] if scheme == "CTNormalization" else None for i, scheme in enumerate(c.schemes)]
    how = {"axes": plans["transpose_forward"], "spacing": c.spacing, "schemes": c.schemes, "masked": c.masked}
    return json.loads(json.dumps({**how, "properties": used}))


def _files(paths: Sequence[Path]) -> list[list[Any]]:
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _made(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")).get("made") if path.exists() else None


def check_rules(folder: Path, names: Sequence[str], how: dict[str, Any]) -> None:
    """UserError for a case that was preprocessed by other plans than these."""
    for name in names:
        made = _made(folder, name)
        if made and made["how"] != how:
            raise UserError(f"{folder}: {name} was preprocessed by other plans; run vmamba medseg preprocess again")


def store(
    folder: Path, name: str, data: np.ndarray, label: np.ndarray, crop: Crop, made: dict[str, Any] | None = None
) -> None:
    """Writes a preprocessed case and what it was ``made`` of; the .json comes last: a case that has it is complete."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    for path, array in ((folder / f"{name}.npy", data), (folder / f"{name}_seg.npy", label)):
        with replacing(path) as partial:
            np.save(partial, array)
    with replacing(folder / f"{name}_places.npz") as partial:
        np.savez(partial, **_places(label))  # pyright: ignore[reportArgumentType]
    with replacing(folder / f"{name}.json") as partial:
        partial.write_text(json.dumps({**asdict(crop), "made": made}), encoding="utf-8")


def _places(label: np.ndarray) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    places = {}
    for value in np.unique(label[label >= 0]):
        found = np.argwhere(label == value).astype(np.int32)
        places[str(value)] = found if len(found) <= LOCATIONS else draw.choice(found, LOCATIONS, axis=0, replace=False)
    return places


@dataclass(frozen=True)
class Stored:
    """A preprocessed case on disk; arrays are mapped, not read."""

    folder: Path
    name: str

    @property
    def data(self) -> np.ndarray:
        """(c, z, y, x) float32"""
        return np.load(self.folder / f"{self.name}.npy", mmap_mode="r")

    @property
    def label(self) -> np.ndarray:
        """(z, y, x) int16"""
        return np.load(self.folder / f"{self.name}_seg.npy", mmap_mode="r")

    @property
    def crop(self) -> Crop:
        """Where it lies in its file."""
        stored = json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))
        box = tuple((a, b) for a, b in stored["box"])
        return Crop(tuple(stored["whole"]), box, tuple(stored["spacing"]))

    def places(self) -> dict[int, np.ndarray]:
        """Voxels (n, 3) of each label."""
        with np.load(self.folder / f"{self.name}_places.npz") as stored:
            return {int(key): stored[key] for key in stored.files}


def stored_cases(folder: Path, names: Sequence[str]) -> list[Stored]:
    """Cases by name; UserError names the first that is not there."""
    for name in names:
        if not (folder / f"{name}.json").exists():
            raise UserError(f"{folder}: {name} is not preprocessed; run vmamba medseg preprocess")
    return [Stored(folder, name) for name in names]

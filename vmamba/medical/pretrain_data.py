"""Images without labels: those of a planned data set and of further folders, or of one plain folder.

Each is prepared once, as training would, and lies as NAME.npy, (c, z, y, x) float32, in a folder of its kind. The .json
beside it says from which files and how it was made: if these change, it is made again.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.medical.cases import ARRAYS, IMAGES, LABELS, is_volume, list_images
from vmamba.medical.folds import fold_cases
from vmamba.medical.jobs import Job
from vmamba.medical.loading import loader
from vmamba.medical.patches import Draws, Epoch, cut
from vmamba.medical.plan import Configuration
from vmamba.medical.preprocess import Stored, preprocess_case
from vmamba.medical.pretrain_settings import NORMALISATIONS, PretrainSettings
from vmamba.medical.raw import channel_files
from vmamba.medical.readers import read_image
from vmamba.medical.transforms import normalise
from vmamba.medical.volume import Volume, read_volume
from vmamba.safety import only_writer, replacing

FLIPS = (0.2, 0.2, 0.1)  # MambaMIM's chances of mirroring each axis
_CHANNEL = re.compile(r"_\d{4}$")

Files = dict[str, tuple[Path, ...]]  # {name: channel files}


def dataset_images(job: Job, settings: PretrainSettings, *, progress: bool) -> list[Stored]:
    """The images in imagesTr, labelled or not, and in the folders ``settings.images``, prepared by the plans.

    Of a numbered fold its validation cases are left out; ``fold`` none: the folders alone. UserError if none is left.
    """
    dataset, c = job.dataset, job.configuration
    channels, ending = len(dataset.channels), dataset.ending
    files = {} if settings.fold == "none" else channel_files(dataset.folder / "imagesTr", channels, ending)
    if settings.fold not in ("none", "all"):
        labelled = sorted(set(list_images(dataset.folder / "labelsTr", LABELS)) & set(files))
        held_out = set(fold_cases(job.preprocessed / "splits_final.json", labelled, settings.fold)[1])
        files = {name: paths for name, paths in files.items() if name not in held_out}
    ready = {name: Stored(job.stored, name) for name in files if (job.stored / f"{name}.json").exists()}
    new = {name: paths for name, paths in files.items() if name not in ready}
    for folder in map(Path, settings.images):
        for name, paths in channel_files(folder, channels, ending).items():
            key = name if name not in {**ready, **new} else f"{folder.resolve().name}_{name}"
            if key in {**ready, **new}:
                raise UserError(f"{paths[0]}: a second image of the name {key}; rename one of them")
            new[key] = paths
    if not ready and not new:
        raise UserError(f"{dataset.folder}: no image to pre-train on; expected imagesTr/NAME_0000{ending}, or --images")

    def make(paths: Sequence[Path]) -> np.ndarray:
        return preprocess_case(read_volume(paths, channels), None, job.plans, c)[0]

    how = {"spacing": c.spacing, "schemes": c.schemes, "axes": job.plans["transpose_forward"]}
    folder = job.preprocessed / f"{job.stored.name}_images"
    made = store(new, folder, make, how, progress=progress) if new else []
    images = {**ready, **{image.name: image for image in made}}
    return [images[name] for name in sorted(images)]


def folder_files(folder: Path) -> Files:
    """The images of a plain folder, or of images/ in it; NAME_0000, NAME_0001 ... are channels of one. UserError: none.

    Labels, if there are any, are not looked at.
    """
    root = folder / "images" if (folder / "images").is_dir() else folder
    found = list_images(root) or list_images(root, ARRAYS)
    if not found:
        raise UserError(f"{root}: holds no image; expected files ending in {', '.join(IMAGES)}")
    numbered = all(_CHANNEL.search(name) for name in found)
    files: dict[str, list[Path]] = {}
    for name, path in found.items():
        files.setdefault(_CHANNEL.sub("", name) if numbered else name, []).append(path)
    counts = {len(paths) for paths in files.values()}
    if len(counts) > 1:
        name = min(files, key=lambda name: len(files[name]))
        raise UserError(f"{root}: case {name} has {len(files[name])} channel file(s), others have {max(counts)}")
    return {name: tuple(paths) for name, paths in files.items()}


def folder_images(
    files: Files, axes: int, channels: int, settings: PretrainSettings, cache: Path, *, progress: bool
) -> list[Stored]:
    """Images of :func:`folder_files` prepared for a network of 2 or 3 dimensions: as slices, or as volumes."""
    flat = next((paths[0] for paths in files.values() if not is_volume(paths[0])), None)
    if axes == 3 and flat:
        raise UserError(f"{flat}: a picture; {settings.network} reads volumes (.nii.gz), or choose a 2D --model")
    if axes == 2 and settings.spacing:
        raise UserError("--spacing: is for networks of 3 dimensions; slices are read as they are")

    def make(paths: Sequence[Path]) -> np.ndarray:
        data = (_slices if axes == 2 else _volume)(paths, channels, settings)
        if len(data) != channels:
            raise UserError(f"{paths[0]}: {len(data)} channel(s), but the first image has {channels}")
        return data

    how = {k: getattr(settings, k) for k in ("normalisation", "window", "spacing")} | {"axis": settings.axis}
    return store(files, cache, make, {**how, "axes": axes}, progress=progress)


def _slices(paths: Sequence[Path], _: int, settings: PretrainSettings) -> np.ndarray:
    stack = _clipped(read_image(paths, settings.axis), settings.window)
    return normalise(stack, settings.normalisation).swapaxes(0, 1)  # (c, s, h, w)


def _volume(paths: Sequence[Path], channels: int, settings: PretrainSettings) -> np.ndarray:
    image = read_volume(paths, channels)
    image = Volume(_clipped(image.data, settings.window), image.spacing, image.source)
    if settings.window and settings.normalisation != "none":  # what is as dark as the window allows is empty
        image.data[...] -= settings.window[0]
    wanted = settings.spacing or image.spacing[::-1]
    spacing = tuple((wanted * 3 if len(wanted) == 1 else wanted)[::-1])
    many = (NORMALISATIONS[settings.normalisation],) * channels, (False,) * channels
    c = Configuration("3d", "", (1, 1, 1), 1, spacing, *many, False, (), (), (), ((), ()))
    properties = {str(i): {} for i in range(channels)}
    plans = {"transpose_forward": [0, 1, 2], "foreground_intensity_properties_per_channel": properties}
    return preprocess_case(image, None, plans, c)[0]


def _clipped(data: np.ndarray, window: Sequence[float] | None) -> np.ndarray:
    return data.clip(window[0], window[1]) if window else data


def store(
    files: Files, folder: Path, make: Callable[[Sequence[Path]], np.ndarray], how: dict[str, Any], *, progress: bool
) -> list[Stored]:
    """Prepares images into ``folder`` by ``make(paths)``, those that are not there yet, made in the same way."""
    with only_writer(folder):
        for name, paths in tqdm(files.items(), desc="prepare", unit="image", disable=not progress):
            stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
            made = json.dumps({"files": stats, "how": how})
            about = folder / f"{name}.json"
            if about.exists() and about.read_text() == made:
                continue
            about.unlink(missing_ok=True)
            data = make(paths)
            with replacing(folder / f"{name}.npy") as partial:
                np.save(partial, np.ascontiguousarray(data, np.float32))
            with replacing(about) as partial:
                partial.write_text(made)
    return [Stored(folder, name) for name in files]


class ImagePatches(Dataset):
    """Items (c, *patch) float32, asked for as (epoch, index), which decide the image, the place in it and mirrors.

    Args:
        images: prepared images. patch: 2 or 3 sides; of 2 in a slice at random depth. draws: of an epoch.
        floor: beyond the image lies its smallest value, as training on plain folders has it; otherwise 0, as nnU-Net.
    """

    def __init__(self, images: Sequence[Stored], patch: Sequence[int], draws: Draws, *, floor: bool = False) -> None:
        self.images, self.patch, self.draws, self.floor = list(images), tuple(patch), draws, floor

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        draw = np.random.default_rng((self.draws.seed, *key))
        data = self.images[int(draw.integers(len(self.images)))].data
        if len(self.patch) == 2:
            data = data[:, int(draw.integers(data.shape[1]))]
        origin = [
            int(draw.integers(min(0, side - n), max(0, side - n) + 1))
            for side, n in zip(data.shape[1:], self.patch, strict=True)
        ]
        if self.floor:
            low = data.min((1, 2), keepdims=True)
            image = cut(data - low, origin, self.patch, 0) + low
        else:
            image = cut(data, origin, self.patch, 0)
        mirrored = [i + 1 for i, chance in enumerate(FLIPS[: len(self.patch)]) if draw.random() < chance]
        return torch.from_numpy(np.flip(image, tuple(mirrored)).astype(np.float32))


class ImageData(pl.LightningDataModule):
    """Patches for the trainer."""

    def __init__(self, patches: ImagePatches, workers: int) -> None:
        super().__init__()
        self.patches, self.workers = patches, workers

    def train_dataloader(self) -> DataLoader:
        """The patches of an epoch; every process has its share."""
        share = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return loader(self.patches, Epoch(self.patches.draws, share), self.workers, ranks=share[1])

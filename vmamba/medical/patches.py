"""Patches for training: cases and places drawn from (seed, epoch, index), a third of them on the foreground."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
)
from monai.transforms.spatial.dictionary import RandFlipd, RandSimulateLowResolutiond
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vmamba.medical.drawn import transformed
from vmamba.medical.loading import loader
from vmamba.medical.preprocess import OUTSIDE, Stored
from vmamba.medical.spatial import RandPatchd

FOREGROUND = 0.33  # share of a batch whose patches are centred on the foreground
LARGER = 1.2  # what is read around a patch that may be turned
_KEYS = ("image", "label")


def _mirrored(axes: int) -> list[Any]:
    return [RandFlipd(_KEYS, prob=0.5, spatial_axis=i) for i in range(axes)]


def _standard(patch: Sequence[int]) -> list[Any]:
    """nnU-Net's augmentation, in its order and with its probabilities."""
    axes = len(patch)
    turn = np.pi if axes == 2 and max(patch) <= 1.5 * min(patch) else np.pi / 12 if axes == 2 else np.pi / 6
    flat = axes == 3 and max(patch) > 3 * patch[0]  # thick slices: turned and scaled within the slice
    angles = [np.pi, 0, 0] if flat else [turn] * (1 if axes == 2 else 3)
    return [
        RandPatchd({"image": "bilinear", "label": "nearest"}, patch, angles, flat),
        RandGaussianNoised("image", prob=0.1, std=0.3),
        RandGaussianSmoothd("image", prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
        RandScaleIntensityd("image", prob=0.15, factors=0.25),
        RandScaleIntensityFixedMeand("image", prob=0.15, factors=0.25, preserve_range=True),
        RandSimulateLowResolutiond("image", prob=0.25, upsample_mode=("bilinear", "trilinear")[axes - 2]),
        RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
        RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        *_mirrored(axes),
    ]


AUGMENTATIONS: dict[str, tuple[float, Callable[[Sequence[int]], list[Any]]]] = {
    "standard": (LARGER, _standard),
    "mirror": (1.0, lambda patch: _mirrored(len(patch))),
    "none": (1.0, lambda _: []),
}


@dataclass(frozen=True)
class Draws:
    """How many patches make an epoch, and from what they are drawn."""

    batch: int
    iterations: int
    seed: int


class Patches(Dataset):
    """Items (image (c, *patch) float32, label values (1, *patch) int16), asked for as (epoch, index).

    Args:
        cases: preprocessed cases. patch: 2 or 3 sides; 2D patches are drawn from the slices of a random depth.
        draws: of the epoch. augmentation: a key of :data:`AUGMENTATIONS`.
        wanted: label values whose places count as foreground.
    """

    def __init__(
        self, cases: Sequence[Stored], patch: Sequence[int], draws: Draws, augmentation: str, wanted: Sequence[int]
    ) -> None:
        self.cases, self.patch, self.draws = list(cases), tuple(patch), draws
        larger, transforms = AUGMENTATIONS[augmentation]
        self.read = tuple(round(larger * n) for n in patch)
        self.transform = Compose(transforms(patch))
        places = [case.places() for case in self.cases]
        self.places = [{v: p for v, p in found.items() if v in wanted} for found in places]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        draw = np.random.default_rng((self.draws.seed, epoch, index))
        n = int(draw.integers(len(self.cases)))
        case, places, last = self.cases[n], self.places[n], index % self.draws.batch
        data, label = case.data, case.label
        forced = last >= round(self.draws.batch * (1 - FOREGROUND))
        if forced and places:
            choice = places[list(places)[int(draw.integers(len(places)))]]
            centre = choice[int(draw.integers(len(choice)))].tolist()
            origin = [c - r // 2 for c, r in zip(centre[-len(self.patch) :], self.read, strict=True)]
        else:
            centre = [int(draw.integers(side)) for side in label.shape]
            origin = [
                int(draw.integers(min(0, side - r), max(0, side - r) + 1))
                for side, r in zip(label.shape[-len(self.patch) :], self.read, strict=True)
            ]
        if len(self.patch) == 2:
            data, label = data[:, centre[0]], label[centre[0]]
        image, mask = cut(data, origin, self.read, 0), cut(label[None], origin, self.read, OUTSIDE)
        sample = {"image": torch.from_numpy(image), "label": torch.from_numpy(mask.astype(np.float32))}
        sample = transformed(self.transform, sample, int(draw.integers(2**31)))
        return sample["image"].float(), sample["label"].round().short()


def cut(maps: np.ndarray, origin: Sequence[int], size: Sequence[int], value: float) -> np.ndarray:
    """The window (c, *size) at ``origin`` of (c, *shape), with ``value`` where it reaches beyond."""
    inner = tuple(slice(max(o, 0), max(min(o + n, m), 0)) for o, n, m in zip(origin, size, maps.shape[1:], strict=True))
    part = np.asarray(maps[(slice(None), *inner)])
    before = [s.start - o for s, o in zip(inner, origin, strict=True)]
    pads = [(b, n - b - m) for b, n, m in zip(before, size, part.shape[1:], strict=True)]
    return np.pad(part, [(0, 0), *pads], constant_values=value)


class Epoch(Sampler):
    """The keys of an epoch's batches; every process has its share."""

    def __init__(self, draws: Draws, share: tuple[int, int]) -> None:
        self.draws, self.share, self.epoch = draws, share, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.draws.iterations

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, world = self.share
        for i in range(self.draws.iterations):
            first = (i * world + rank) * self.draws.batch
            yield [(self.epoch, first + j) for j in range(self.draws.batch)]


class PatchData(pl.LightningDataModule):
    """Training and validation patches for the trainer."""

    def __init__(self, train: Patches, val: Patches, workers: int) -> None:
        super().__init__()
        self.train, self.val, self.workers = train, val, workers

    def _loader(self, data: Patches) -> DataLoader:
        share = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return loader(data, Epoch(data.draws, share), self.workers, ranks=share[1])

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Labels become int64 where they are used: two bytes a voxel travel, not eight."""
        image, label = batch
        return image, label.long()

    def train_dataloader(self) -> DataLoader:
        """Augmented patches."""
        return self._loader(self.train)

    def val_dataloader(self) -> DataLoader:
        """Patches as they are, the same in every epoch."""
        return self._loader(self.val)

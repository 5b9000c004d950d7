"""Slices in memory and how they reach the network: order and augmentation follow (seed, epoch, index) alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vmamba.medical.loading import loader
from vmamba.medical.transforms import Augment


@dataclass
class Stack:
    """One case, or a block of one: normalised image (s, c, h, w) float32 and classes (s, h, w)."""

    name: str
    image: np.ndarray
    label: np.ndarray


class Slices(Dataset):
    """The slices of some stacks; an item is asked for as (epoch, index, counted)."""

    def __init__(self, stacks: list[Stack], augment: Augment | None = None, seed: int = 0) -> None:
        self.stacks, self.augment, self.seed = stacks, augment, seed
        self.items = [(i, s) for i, stack in enumerate(stacks) for s in range(len(stack.image))]

    def __len__(self) -> int:
        return len(self.items)

    def shape(self, index: int) -> tuple[int, ...]:
        """(c, h, w) of a slice."""
        return self.stacks[self.items[index][0]].image.shape[1:]

    def __getitem__(self, key: tuple[int, int, bool]) -> tuple[Tensor, Tensor, bool]:
        epoch, index, counted = key
        stack, s = self.items[index]
        image = torch.from_numpy(self.stacks[stack].image[s])
        label = torch.from_numpy(self.stacks[stack].label[s].astype(np.int64))
        if self.augment is not None:
            draw = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]
            image, label = self.augment(image, label, int(draw))
        return image, label, counted


class Shuffled(Sampler):
    """Batches of one epoch in an order drawn from (seed, epoch); every process gets as many batches."""

    def __init__(self, data: Slices, batch_size: int, share: tuple[int, int] = (0, 1)) -> None:
        self.data, self.batch_size, self.share, self.epoch = data, batch_size, share, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(len(self.data) // (self.batch_size * self.share[1]), 1)

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
        rank, world = self.share
        order = np.random.default_rng((self.data.seed, self.epoch)).permutation(len(self.data))
        order = np.resize(order, max(len(self) * self.batch_size * world, 1))[rank::world]
        if len(self.data) < self.batch_size * world:
            order = order[: max(len(self.data) // world, 1)]
        for start in range(0, len(order), self.batch_size):
            yield [(self.epoch, int(i), True) for i in order[start : start + self.batch_size]]


class InOrder(Sampler):
    """Batches of neighbouring slices of one size; a batch repeated to even out the processes is not counted."""

    def __init__(self, data: Slices, batch_size: int, share: tuple[int, int] = (0, 1)) -> None:
        batches: list[list[int]] = []
        for i in range(len(data)):
            if batches and len(batches[-1]) < batch_size and data.shape(batches[-1][0]) == data.shape(i):
                batches[-1].append(i)
            else:
                batches.append([i])
        rank, world = share
        full = -(-len(batches) // world) * world
        self.batches = [[(0, i, n < len(batches)) for i in batches[n % len(batches)]] for n in range(rank, full, world)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
        return iter(self.batches)


class SliceData(pl.LightningDataModule):
    """Training and validation slices for the trainer."""

    def __init__(self, train: Slices, val: Slices, batch_size: int, workers: int = 0) -> None:
        super().__init__()
        self.train, self.val, self.batch_size, self.workers = train, val, batch_size, workers

    def _loader(self, sampler: type[Shuffled] | type[InOrder], data: Slices) -> DataLoader:
        share = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = sampler(data, self.batch_size, share)
        return loader(data, batches, self.workers, ranks=share[1], keep=sampler is Shuffled)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented patches."""
        return self._loader(Shuffled, self.train)

    def val_dataloader(self) -> DataLoader:
        """Whole slices in order."""
        return self._loader(InOrder, self.val)

"""Whether loading keeps up: Lightning's loop as ``vmamba medseg train`` runs it, with augmented patches and without."""

import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from vmamba.benchmark import Row, clean_up
from vmamba.medical.benchmark import Example, Setup, build, supervise
from vmamba.medical.fold_module import CLIP, FoldModule, FoldSettings
from vmamba.medical.labelset import classes
from vmamba.medical.patches import Draws, PatchData, Patches
from vmamba.medical.preprocess import Crop, Stored, store
from vmamba.medical.quiet import quiet
from vmamba.medical.train import Hardware, build_trainer

KEY = ("name", "patch", "batch", "precision", "workers")
BUSY = "NVML's utilization.gpu, five samples a second: the share of time in which a kernel ran"
CASES, LARGER, SLICES = 4, 1.5, 8  # of the made-up data set: sides in patches, slices for a 2D network
PERIOD = 0.2


def facts(name: str, setup: Setup, precision: str, hardware: Hardware) -> Row:
    """What is known beforehand."""
    row: Row = {"name": name, "patch": setup.size, "batch": setup.batch, "precision": precision}
    return {**row, "workers": hardware.loaders, "setup": setup.source, "failure": None}


def measure(name: str, setup: Setup, precision: str, hardware: Hardware, steps: int) -> list[Row]:
    """Iterations per second of the loop without loading and with it, batches per second of the loading alone.

    ``busy`` is the share of time in which the GPU computed, with loading; None where it cannot be known.
    """
    row = facts(name, setup, precision, hardware)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        cases = made_up_cases(Path(folder), setup)
        settings = FoldSettings(trainer=name, epochs=1, precision=precision)
        data = _Fed(cases, setup, hardware.loaders, settings, _warmup(hardware) + steps)
        row["loading_per_s"] = _alone(data, _warmup(hardware), steps)
        row["without_per_s"], row["busy_without"] = _loop(
            name, setup, settings, hardware, _Resident(setup, data), steps
        )
        row["with_per_s"], row["busy"] = _loop(name, setup, settings, hardware, data, steps)
    return [row]


def made_up_cases(folder: Path, setup: Setup) -> list[Stored]:
    """Preprocessed cases of noise with a box of each class, a half larger than the patch."""
    flat = len(setup.patch) == 2
    sides = tuple(round(LARGER * n) for n in setup.patch)
    shape = (SLICES, *sides) if flat else sides
    draw = np.random.default_rng(0)
    for i in range(CASES):
        label = np.zeros(shape, np.int16)
        for value in range(1, setup.classes):
            corner = [int(draw.integers(n - n // 4)) for n in sides]
            label[(..., *(slice(a, a + n // 4) for a, n in zip(corner, sides, strict=True)))] = value
        data = draw.standard_normal((setup.channels, *shape), np.float32)
        store(folder, f"case_{i}", data, label, Crop(shape, tuple((0, n) for n in shape), (1.0, 1.0, 1.0)))
    return [Stored(folder, f"case_{i}") for i in range(CASES)]


class _Fed(PatchData):
    """What trains a fold, without validation."""

    def __init__(
        self, cases: Sequence[Stored], setup: Setup, workers: int, settings: FoldSettings, iterations: int
    ) -> None:
        draws = Draws(setup.batch, iterations, settings.seed)
        patches = Patches(cases, setup.patch, draws, settings.augmentation, range(1, setup.classes))
        super().__init__(patches, patches, workers)


class _Resident(pl.LightningDataModule):
    """The same batch again and again, on the device from the start."""

    def __init__(self, setup: Setup, like: _Fed) -> None:
        super().__init__()
        self.patches, self.count = setup, like.train.draws.iterations

    def train_dataloader(self) -> DataLoader:
        """``count`` times one batch."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        example = Example.make(self.patches, device)
        batches: Any = [(example.image, example.label)] * self.count
        return DataLoader(batches, batch_size=None)

    val_dataloader = train_dataloader  # not run


class _Clock(Callback):
    """Times the steps after the first ``warmup``, and asks how busy the GPU is meanwhile."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps, self.seconds = warmup, steps, 0.0
        self.samples: list[int] = []
        self.over = threading.Event()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Starts after the warm-up."""
        if index == self.warmup:
            _wait(pl_module.device)
            if pl_module.device.type == "cuda":
                threading.Thread(target=self._watch, args=(pl_module.device,), daemon=True).start()
            self.seconds = -time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Stops at the last step."""
        if rest[-1] == self.warmup + self.steps - 1:
            _wait(pl_module.device)
            self.seconds += time.perf_counter()
            self.over.set()

    def _watch(self, device: torch.device) -> None:
        while not self.over.wait(PERIOD):
            try:
                self.samples.append(torch.cuda.utilization(device))
            except Exception:  # NVML or its Python package is missing: the figure stays unknown
                return


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warmup(hardware: Hardware) -> int:
    """Steps after which the batches that the processes made beforehand are used up."""
    return 3 * max(hardware.loaders, 1)


def _alone(data: _Fed, warmup: int, steps: int) -> float:
    start = 0.0
    for index, _ in enumerate(data.train_dataloader()):
        if index == warmup - 1:
            start = time.perf_counter()
    return steps / (time.perf_counter() - start)


def _loop(
    name: str, setup: Setup, settings: FoldSettings, hardware: Hardware, data: pl.LightningDataModule, steps: int
) -> tuple[float, float | None]:
    torch.manual_seed(settings.seed)
    network = build(name, setup)
    module = FoldModule(network, classes(setup.classes - 1), settings, batch_dice=len(setup.patch) == 2)
    module.supervised = supervise(network, True)
    clock = _Clock(_warmup(hardware), steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            hardware,
            [clock],
            Path(folder),
            max_epochs=1,
            precision=settings.precision,
            gradient_clip_val=CLIP,
            benchmark=True,
            limit_val_batches=0,
            enable_checkpointing=False,
        )
        trainer.fit(module, data)
    del trainer, module, network
    clean_up()
    samples = clock.samples[1:]  # the first one looks back at the time before
    return steps / clock.seconds, mean(samples) / 100 if samples else None

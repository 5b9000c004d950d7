"""Whether loading keeps up: Lightning's loop as ``vmamba medseg train`` runs it, with augmented patches and without."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from vmamba.benchmark import Row, clean_up
from vmamba.medical.benchmark import Example, Setup, build, supervise
from vmamba.medical.busy import Trace
from vmamba.medical.captured import WARMUP
from vmamba.medical.fold_module import CLIP, FoldModule, FoldSettings
from vmamba.medical.labelset import classes
from vmamba.medical.loading import AHEAD
from vmamba.medical.patches import Draws, PatchData, Patches
from vmamba.medical.preprocess import Crop, Stored, store
from vmamba.medical.quiet import quiet
from vmamba.medical.train import Hardware, build_trainer

KEY = ("name", "patch", "batch", "precision", "workers")
TRACED, SECONDS = 8, 8.0  # steps that are traced; what a stretch of steps may take
BUSY = f"the share of time in which a kernel or copy ran, in {TRACED} steps more (torch.profiler)"
CASES, LARGER, SLICES = 4, 1.5, 8  # of the made-up data set: sides in patches, slices for a 2D network


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
        data = _Fed(cases, setup, hardware.loaders, settings, _warmup(hardware) + steps + TRACED)
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
    """Times the steps after the warm-up, then traces a few more and ends the training.

    Args:
        warmup, steps: how many, at most; a stretch of more steps than it takes to a graph ends after :data:`SECONDS`.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.left = {"warmup": warmup, "steps": steps, "traced": TRACED}
        self.stretch, self.done, self.start, self.per_s = "warmup", 0, 0.0, 0.0
        self.trace: Trace | None = None
        self.busy: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self.trace = Trace() if pl_module.device.type == "cuda" else None
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Goes on to the next stretch where one is over."""
        self.done += 1
        late = time.perf_counter() - self.start > SECONDS
        if self.done < self.left[self.stretch] and not (late and self.done > WARMUP):
            return
        _wait(pl_module.device)
        if self.stretch == "warmup":
            self.stretch = "steps"
        elif self.stretch == "steps":
            self.per_s = self.done / (time.perf_counter() - self.start)
            self.stretch = "traced"
            if self.trace:
                self.trace.start()
        else:
            self.busy = self.trace.stop(pl_module.device) if self.trace else None
            trainer.should_stop = True
        self.done, self.start = 0, time.perf_counter()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warmup(hardware: Hardware) -> int:
    """Steps after which there is a graph, and the batches that the processes made beforehand are used up."""
    return 1 + max(WARMUP, AHEAD * hardware.loaders)


def _alone(data: _Fed, warmup: int, steps: int) -> float:
    """Batches per second, of those that come after the first ``warmup``."""
    begin = start = time.perf_counter()
    count = 0
    for count, _ in enumerate(data.train_dataloader(), 1 - warmup):
        now = time.perf_counter()
        if count <= 0:
            start = now
        if count >= steps or now - begin > 2 * SECONDS:
            break
    return count / (time.perf_counter() - start) if count > 0 else float("nan")


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
    return clock.per_s, clock.busy

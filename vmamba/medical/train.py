"""Training: Lightning's loop over the prepared slices, and the run folder it leaves behind."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping

from vmamba.errors import UserError
from vmamba.machine import cpus
from vmamba.medical import mri
from vmamba.medical.callbacks import Bar, Budget, Keep, MetricsFile, read_metrics
from vmamba.medical.data import SliceData
from vmamba.medical.imagenet import load_start
from vmamba.medical.loading import meaning, stopped
from vmamba.medical.module import Segmenter
from vmamba.medical.plots import save_curves
from vmamba.medical.prepare import Prepared, prepare
from vmamba.medical.pretrained import describe
from vmamba.medical.quiet import quiet
from vmamba.medical.recipes import BEST, RECIPES
from vmamba.medical.runs import check_run, clear_run, write_json
from vmamba.medical.spec import Settings
from vmamba.medical.watch import Watch
from vmamba.safety import only_writer

COLUMNS = {"train_loss": "train_loss_epoch"}  # what Lightning calls it
LOADERS = 12  # processes that load and augment beside a GPU, as nnU-Net has it


@dataclass
class Hardware:
    """Where the training runs; Lightning's own words.

    ``workers`` processes load and augment. None: none on a CPU, where they would compete with the training; beside a
    GPU :data:`LOADERS`, or its share of the cores if that is less. ``graphs``: one GPU runs a step as a CUDA graph.
    """

    accelerator: str = "auto"
    devices: str = "auto"
    strategy: str = "auto"
    workers: int | None = None
    progress: bool = True
    graphs: bool = True

    @property
    def on_gpu(self) -> bool:
        """Whether Lightning will take a CUDA GPU."""
        return self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()

    @property
    def loaders(self) -> int:
        """``workers``, decided."""
        if self.workers is not None:
            return self.workers
        return min(LOADERS, cpus() // torch.cuda.device_count()) if self.on_gpu else 0


class Interrupted(Exception):
    """Ctrl-C or SIGTERM during training; the run's last.ckpt holds the last whole epoch."""


def train(
    run: Path,
    settings: Settings,
    *,
    hardware: Hardware | None = None,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: list[Callback] | None = None,
) -> dict[str, Any]:
    """Trains into the folder ``run`` and returns what its summary.json holds.

    ``resume`` continues after the last whole epoch, with the settings of :func:`vmamba.medical.runs.resumed`.
    Raises UserError for bad input, Interrupted after Ctrl-C.
    """
    hardware = hardware or Hardware()
    with quiet():
        watching = _callbacks(run, settings, hardware, callbacks or [])
        trainer = build_trainer(hardware, watching, run, max_epochs=settings.epochs, precision=settings.precision)
        first = trainer.global_rank == 0
        if first and not resume:
            check_run(run, overwrite)
        prepared = prepare(settings)
        torch.manual_seed(settings.seed)
        module = Segmenter(prepared.spec, settings)
        module.captures = hardware.graphs
        if settings.pretrained and not resume:
            source = Path(settings.pretrained)
            report = load_start(module.network, source)
            if first:
                print(describe(report, source))
        with only_writer(run):
            if first and not resume:
                check_run(run, overwrite)  # again: nobody else writes now
                clear_run(run)
            if first:
                _announce(prepared, module, settings)
                write_json(run / "config.json", _config(settings, prepared))
                if settings.data is None:
                    for block in ("val", "test"):
                        mri.export_block(run / block, "mni152", prepared.split[block])
            start = time.perf_counter()
            data = SliceData(prepared.train, prepared.val, settings.batch_size, hardware.loaders)
            fit(trainer, module, data, run / "last.ckpt" if resume else None)
            return _finish(run, trainer, module, time.perf_counter() - start) if trainer.global_rank == 0 else {}


def _callbacks(run: Path, settings: Settings, hardware: Hardware, extra: list[Callback]) -> list[Callback]:
    """Checkpoints best and last, the metrics file, the progress bar and the clock."""
    recipe = RECIPES[settings.recipe]
    best = Keep(run, "best", COLUMNS.get(recipe.best, recipe.best), BEST[recipe.best])
    watch = Watch(settings.lr, settings.precision)
    callbacks = [watch, MetricsFile(run / "metrics.csv"), *extra, best, Keep(run, "last", None)]
    if recipe.patience:
        callbacks.append(EarlyStopping(COLUMNS["train_loss"], patience=recipe.patience, check_on_train_epoch_end=True))
    if hardware.progress:
        callbacks.append(Bar())
    if settings.max_minutes:
        callbacks.append(Budget(60 * settings.max_minutes))
    return callbacks


def build_trainer(hardware: Hardware, callbacks: list[Callback], root: Path, **options: Any) -> pl.Trainer:
    """Lightning's trainer on ``hardware``; ``options`` are its own. UserError for hardware that is not there."""
    try:
        return pl.Trainer(
            accelerator=hardware.accelerator,
            devices=int(hardware.devices) if hardware.devices.lstrip("-").isdigit() else hardware.devices,
            strategy=hardware.strategy,
            callbacks=callbacks,
            enable_progress_bar=hardware.progress,
            logger=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=root,
            **options,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        asked = f"--accelerator {hardware.accelerator} --devices {hardware.devices} --strategy {hardware.strategy}"
        raise UserError(f"{asked} --precision {options['precision']}: {' '.join(str(error).split())}") from error


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, last: Path | None) -> None:
    """Trains, from the checkpoint ``last`` if there is one; Interrupted after Ctrl-C or SIGTERM.

    UserError where a process that loads died.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, data, ckpt_path=last, weights_only=True)
    except SystemExit as stop:
        signal.signal(signal.SIGINT, handler)
        raise Interrupted(f"interrupted in epoch {trainer.current_epoch + 1}; continue with --resume") from stop
    except RuntimeError as error:
        if stopped(error):
            raise Interrupted(f"terminated in epoch {trainer.current_epoch + 1}; continue with --resume") from error
        reason = meaning(error)
        if reason is None:
            raise
        raise UserError(reason) from error


def _announce(prepared: Prepared, module: Segmenter, settings: Settings) -> None:
    for note in prepared.notes:
        print(note)
    size = sum(p.numel() for p in module.network.parameters()) / 1e6
    patch = " x ".join(map(str, prepared.spec.patch))
    plan = f"patches of {patch}, batch {settings.batch_size}, {settings.epochs} epochs"
    print(f"{settings.model}, {size:.2f} M parameters, {plan}")
    if settings.recipe != "plain":
        print(f"recipe {settings.recipe}: {RECIPES[settings.recipe].words}")


def _config(settings: Settings, prepared: Prepared) -> dict[str, Any]:
    return {"settings": settings.as_dict(), "spec": prepared.spec.as_dict(), "split": prepared.split}


def _finish(run: Path, trainer: pl.Trainer, module: Segmenter, seconds: float) -> dict[str, Any]:
    rows = read_metrics(run / "metrics.csv")
    save_curves(run / "curves.png", rows)
    by = module.recipe.best
    choose = max if BEST[by] == "max" else min
    best = choose(rows, key=lambda row: float(row[by]))
    summary = {
        "epochs": len(rows),
        "planned_epochs": module.settings.epochs,
        "steps": int(rows[-1]["step"]),
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "best_by": f"{BEST[by]} {by}",
        "best_epoch": int(best["epoch"]),
        "best_val_dice": float(best["val_dice"]),
        "last_val_dice": float(rows[-1]["val_dice"]),
        "best_val_dice_per_class": {name: float(best[f"dice_{name}"]) for name in module.spec.classes[1:]},
        "convention": "Dice over the voxels of all validation slices together, mean over the foreground classes",
        "device": str(trainer.strategy.root_device),
    }
    write_json(run / "summary.json", summary)
    return summary

"""What a run writes while it trains (metrics.csv) and how it keeps to its time."""

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_only

from vmamba.medical.module import Segmenter
from vmamba.safety import replacing


def scores(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """What an epoch of segmentation tells: Dice, the module's ``history``, loss of the validation, learning rate."""
    metrics = trainer.callback_metrics
    return {
        "val_dice": float(metrics["val_dice"]),
        **cast(dict[str, float], module.history),
        **({"val_loss": float(metrics["val_loss"])} if "val_loss" in metrics else {}),
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
    }


class MetricsFile(Callback):
    """One row an epoch in metrics.csv: epoch, step, loss, ``figures``, seconds; a resumed run drops what it repeats.

    Args:
        path: of the file. figures: further columns, of the trainer and its module.
    """

    def __init__(
        self, path: Path, figures: Callable[[pl.Trainer, pl.LightningModule], dict[str, Any]] = scores
    ) -> None:
        self.path, self.figures, self.start = path, figures, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the epoch's clock."""
        self.start = time.perf_counter()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Appends the epoch's figures."""
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "train_loss": float(trainer.callback_metrics["train_loss_epoch"]),
            **self.figures(trainer, pl_module),
            "seconds": round(time.perf_counter() - self.start, 2),
        }
        before = read_metrics(self.path) if self.path.exists() else []
        kept = [r for r in before if int(r["epoch"]) < row["epoch"]]
        with replacing(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows([*kept, row])


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, one dictionary an epoch."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Budget(Callback):
    """Ends the training after ``seconds``; where they are too few for the plan, the cosine follows the clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Tells the schedule the share of the time that is over, and stops when all is."""
        assert isinstance(pl_module, Segmenter)
        share = (time.perf_counter() - self.start) / self.seconds
        pl_module.time_share = trainer.strategy.broadcast(share)  # one clock for all processes
        trainer.should_stop = trainer.should_stop or pl_module.time_share >= 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says so if the time was too short for the plan."""
        if trainer.should_stop and trainer.is_global_zero:
            print(f"{self.seconds / 60:g} min were over in epoch {trainer.current_epoch} of {trainer.max_epochs}")


class Keep(ModelCheckpoint):
    """RUN/NAME.ckpt after each epoch, or after those where ``monitor`` is best so far; the folder may move."""

    def __init__(self, run: Path, name: str, monitor: str | None, mode: str = "max") -> None:
        super().__init__(
            run, name, monitor=monitor, mode=mode, save_on_train_epoch_end=True, enable_version_counter=False
        )
        self.path = str(run.resolve() / f"{name}.ckpt")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the score to beat from a checkpoint, wherever its folder was."""
        score = state_dict["best_model_score"]
        if self.monitor and score is not None:
            self.best_model_score = self.kth_value = score
            self.best_model_path = self.kth_best_model_path = self.path
            self.best_k_models = {self.path: score}


class Bar(TQDMProgressBar):
    """One bar for the run's training batches, none for validation."""

    def init_validation_tqdm(self) -> Any:
        """A bar that is never drawn."""
        return Tqdm(disable=True)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Loss and Dice without the version number."""
        metrics = super().get_metrics(trainer, pl_module)
        shown = {"train_loss_step": "loss", "val_dice": "val Dice"}
        return {shown[k]: v for k, v in metrics.items() if k in shown}

"""A training whose loss is no number any more ends and says what to try, without a GPU that waits at every step."""

from collections import deque
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vmamba.errors import UserError

LATE = 2  # steps after which a GPU's loss is read: it has arrived by then, while later steps are queued already


class _Noted(NamedTuple):
    epoch: int
    step: int
    loss: Tensor
    arrived: torch.cuda.Event | None


class Watch(Callback):
    """Raises UserError where a loss is not finite; goes before the callbacks that keep weights.

    Args:
        lr, precision: of the training, for what it advises.
    """

    def __init__(self, lr: float, precision: str) -> None:
        now = [(f"--lr {lr / 10:g}", f"{lr:g}")]
        now += [("--precision 32-true", precision)] if precision != "32-true" else []
        self.advice = "try " + " or ".join(f"{what} (now {value})" for what, value in now)
        self.noted: deque[_Noted] = deque()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the step's loss, and looks at one that is here."""
        self.noted.append(_Noted(trainer.current_epoch + 1, batch_idx + 1, *_fetch(outputs["loss"].detach())))
        while self.noted and (len(self.noted) > LATE or self.noted[0].arrived is None):
            self._look()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the rest, so that no weights are kept that came of one."""
        while self.noted:
            self._look()

    def _look(self) -> None:
        epoch, step, loss, arrived = self.noted.popleft()
        if arrived is not None:
            arrived.synchronize()
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} at step {step} of epoch {epoch}; {self.advice}")


def _fetch(loss: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The loss in main memory, and the event after which it is there; None: at once."""
    if not loss.is_cuda:
        return loss.cpu(), None
    here = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return here, event

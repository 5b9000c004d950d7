"""MambaMIM in training: masks drawn from the seed and the step, AdamW, warm-up and cosine for rate and weight decay."""

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from vmamba.heads.mambamim import MambaMIM, random_cells
from vmamba.medical.pretrain_settings import PretrainSettings

CLIP = 5.0
FIRST, LAST = 0.005, 0.001  # shares of the rate that warm-up starts from and the cosine ends with


class Pretrainer(pl.LightningModule):
    """(b, c, *patch) -> the loss of rebuilding hidden cells.

    Args:
        model: network and decoder. settings: of the pre-training.
    """

    def __init__(self, model: MambaMIM, settings: PretrainSettings) -> None:
        super().__init__()
        self.model, self.settings, self.total_steps = model, settings, 0

    def visible_cells(self, batch: int, grid: tuple[int, ...], key: tuple[int, ...]) -> Tensor:
        """(batch, cells) booleans on the CPU for images of this size; ``key`` and the seed decide the draw."""
        state = np.random.SeedSequence((self.settings.seed, *key)).generate_state(1)[0]
        draw = torch.Generator().manual_seed(int(state))
        rows = batch if self.settings.masks == "sample" else 1
        cells = math.prod(self.model.cells(grid))
        return random_cells(rows, cells, self.settings.mask_ratio, generator=draw).expand(batch, -1)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        """Loss of a batch of patches."""
        key = self.global_step, self.global_rank
        loss = self.model.loss(batch, self.visible_cells(len(batch), tuple(batch.shape[2:]), key))
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(batch), sync_dist=True)
        return loss

    def on_train_batch_start(self, *_: Any) -> None:
        """Sets rate, weight decay and the random numbers of this step, so that a resumed run has the same."""
        s, done = self.settings, self.global_step / max(self.total_steps, 1)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"], group["weight_decay"] = s.lr * rate(done, s.warmup), decay(done, s)
        key = s.seed, self.global_step, self.global_rank
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over all parameters that are trained."""
        self.total_steps = int(self.trainer.estimated_stepping_batches)
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.settings.lr, weight_decay=self.settings.weight_decay)


def rate(done: float, warmup: float) -> float:
    """Share of the rate after a share ``done`` of the steps: linear from 0.5 % to 100 %, then a cosine to 0.1 %."""
    if done < warmup:
        return FIRST + (1 - FIRST) * done / warmup
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * min((done - warmup) / (1 - warmup), 1)))


def decay(done: float, s: PretrainSettings) -> float:
    """The weight decay: a cosine from the first to the last."""
    return s.last_weight_decay + (s.weight_decay - s.last_weight_decay) * 0.5 * (1 + math.cos(math.pi * done))

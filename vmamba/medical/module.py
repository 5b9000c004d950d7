"""The network in training: DiceCE loss, AdamW, cosine, Dice over the validation slices pooled together."""

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from monai.losses.dice import DiceCELoss
from monai.metrics.confusion_matrix import get_confusion_matrix
from monai.networks.utils import one_hot
from torch import Tensor, nn

import vmamba
from vmamba.errors import UserError
from vmamba.medical.inference import infer
from vmamba.medical.spec import Settings, Spec


def build_network(spec: Spec) -> nn.Module:
    """The spec's network by ``vmamba.create_model``; UserError if the name or an option is unknown."""
    try:
        return vmamba.create_model(spec.model, num_classes=len(spec.values), in_chans=spec.channels, **spec.network)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        options = ", ".join(f"{k}={v}" for k, v in spec.network.items())
        raise UserError(f"network {spec.model!r} ({options or 'published options'}): {error}") from error


def build_loss() -> nn.Module:
    """VM-UNet's Synapse loss: cross entropy + Dice over the softmax, all classes, squared denominators, whole batch."""
    return DiceCELoss(softmax=True, to_onehot_y=True, squared_pred=True, batch=True)


class Segmenter(pl.LightningModule):
    """(b, c, h, w) -> logits (b, k, h, w); ``spec`` travels in every checkpoint."""

    def __init__(self, spec: Spec, settings: Settings) -> None:
        super().__init__()
        self.save_hyperparameters({"spec": spec.as_dict(), "settings": settings.as_dict()})
        self.spec, self.settings = spec, settings
        self.network = build_network(spec)
        self.loss = build_loss()
        self.total_steps, self.time_share = 0, 0.0
        self.counts: Tensor | None = None
        self.history: dict[str, float] = {}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        """Loss of a batch of patches."""
        image, label, _counted = batch
        logits = self.network(image)
        expected = (len(image), len(self.spec.values), *image.shape[2:])
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"network {self.spec.model!r} returned {got}, segmentation needs {expected}; try --model vmunet"
            )
        loss = self.loss(logits.float(), label[:, None])
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} in epoch {self.current_epoch}; try a smaller --lr or --precision 32-true"
            )
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(image), sync_dist=True)
        return loss

    def on_train_batch_start(self, *_: Any) -> None:
        """Drop path and dropout depend on (seed, step, rank), so that a resumed run draws the same."""
        key = self.settings.seed, self.global_step, self.global_rank
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def on_validation_epoch_start(self) -> None:
        """Forgets the counts of the last validation."""
        self.counts = torch.zeros(len(self.spec.values), 4, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> None:
        """Adds a batch of whole slices to the pooled counts."""
        image, label, counted = batch
        classes = len(self.spec.values)
        predicted = infer(self.network, image, self.spec.patch, len(image)).argmax(1, keepdim=True)
        confusion = get_confusion_matrix(one_hot(predicted, classes), one_hot(label[:, None], classes))  # (b, k, 4)
        assert self.counts is not None
        self.counts += (confusion * counted[:, None, None].to(confusion)).sum(0)

    def on_validation_epoch_end(self) -> None:
        """Dice of each class over all validation slices together; their foreground mean picks the best checkpoint."""
        assert self.counts is not None
        if self.trainer.world_size > 1:
            gathered = self.all_gather(self.counts)
            assert isinstance(gathered, Tensor)
            self.counts = gathered.reshape(-1, *self.counts.shape).sum(0)
        tp, fp, _, fn = self.counts.unbind(1)
        dice = (2 * tp / (2 * tp + fp + fn)).tolist()
        present = [d for d in dice[1:] if not math.isnan(d)]
        self.history = {f"dice_{name}": d for name, d in zip(self.spec.classes[1:], dice[1:], strict=True)}
        self.log("val_dice", sum(present) / max(len(present), 1), prog_bar=True, rank_zero_only=False)

    def rate(self, step: int) -> float:
        """Cosine from 1 to min_lr / lr over the planned steps, or over the time allowed if that ends first."""
        floor = self.settings.min_lr / self.settings.lr
        done = min(max(step / max(self.total_steps, 1), self.time_share), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    def configure_optimizers(self) -> Any:
        """AdamW and a cosine over all steps."""
        self.total_steps = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

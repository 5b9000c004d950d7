"""The network in training: DiceCE loss, AdamW, cosine, Dice over the validation slices pooled together."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.metrics.confusion_matrix import get_confusion_matrix
from monai.networks.utils import one_hot
from torch import Tensor, nn

import vmamba
from vmamba.errors import UserError
from vmamba.medical.captured import Captured
from vmamba.medical.captured_steps import CapturedSteps
from vmamba.medical.inference import infer
from vmamba.medical.networks import logits
from vmamba.medical.recipe_losses import LOSSES
from vmamba.medical.recipes import RECIPES
from vmamba.medical.spec import Settings, Spec


def build_network(spec: Spec) -> nn.Module:
    """The spec's network by ``vmamba.create_model``; UserError if the name or an option is unknown."""
    try:
        return vmamba.create_model(
            spec.model, **{"num_classes": spec.outputs, "in_chans": spec.channels, **spec.network}
        )
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        options = ", ".join(f"{k}={v}" for k, v in spec.network.items())
        raise UserError(f"network {spec.model!r} ({options or 'published options'}): {error}") from error


def plain(network: nn.Module, spec: Spec) -> Callable[[Tensor], Tensor]:
    """What gives the logits: the network, or, where one output ends in a sigmoid, what comes before it."""
    return partial(logits, network) if spec.sigmoid else network


def class_probabilities(out: Tensor) -> Tensor:
    """Logits (b, k, ...) to the softmax; (b, 1, ...) of one output to both classes (b, 2, ...)."""
    if out.shape[1] > 1:
        return out.softmax(1)
    foreground = out.sigmoid()
    return torch.cat([1 - foreground, foreground], 1)


class Segmenter(CapturedSteps):
    """(b, c, h, w) -> logits (b, k, h, w); ``spec`` travels in every checkpoint.

    On one GPU a step launches all its kernels at once (:class:`Captured`), unless ``captures`` is False.
    """

    def __init__(self, spec: Spec, settings: Settings) -> None:
        super().__init__()
        self.save_hyperparameters({"spec": spec.as_dict(), "settings": settings.as_dict()})
        self.spec, self.settings = spec, settings
        self.network = build_network(spec)
        self.recipe = RECIPES[settings.recipe]
        self.loss = LOSSES[self.recipe.loss]()
        self.captured = Captured(self.loss_of, self.network)
        self.total_steps, self.time_share = 0, 0.0
        self.counts: Tensor | None = None
        self.history: dict[str, float] = {}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        """Loss of a batch of patches."""
        image, label, _counted = batch
        loss = self.captured(image, label)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(image), sync_dist=True)
        return loss

    def loss_of(self, image: Tensor, label: Tensor) -> Tensor:
        """The loss of patches (b, c, h, w) with classes (b, h, w); UserError where the network does not segment."""
        out = plain(self.network, self.spec)(image)
        expected = (len(image), self.spec.outputs, *image.shape[2:])
        if not isinstance(out, Tensor) or out.shape != expected:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(
                f"network {self.spec.model!r} returned {got}, segmentation needs {expected}; try --model vmunet"
            )
        return self.loss(out.float(), label[:, None])

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
        out = infer(plain(self.network, self.spec), image, self.spec.patch, len(image))
        if self.recipe.best == "val_loss":
            loss = self.loss(out, label[:, None])
            self.log("val_loss", loss, on_step=False, on_epoch=True, batch_size=len(image), sync_dist=True)
        predicted = class_probabilities(out).argmax(1, keepdim=True)
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

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves the encoder as it is in the recipe's first epochs."""
        encoder = getattr(self.network, "encoder", None)
        if encoder is not None and self.current_epoch < self.recipe.frozen:
            for parameter in encoder.parameters():
                parameter.grad = None

    def rate(self, step: int) -> float:
        """Cosine from 1 to min_lr / lr over the planned steps, or over the time allowed if that ends first.

        With the recipe's ``half_period`` the steps are epochs, and it goes up and down.
        """
        floor = self.settings.min_lr / self.settings.lr
        done = min(max(step / max(self.total_steps, 1), self.time_share), 1.0)
        if self.recipe.half_period:
            done = step / self.recipe.half_period
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    def configure_optimizers(self) -> Any:
        """AdamW and a cosine."""
        self.total_steps = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay)
        unit = "epoch" if self.recipe.half_period else "step"
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": unit}}

"""One fold in training: nnU-Net's loss, optimiser, schedule, and its moving average of the validation Dice."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from monai.metrics.confusion_matrix import get_confusion_matrix
from monai.networks.utils import one_hot
from torch import Tensor, nn

from vmamba.medical.captured import Captured
from vmamba.medical.captured_steps import CapturedSteps
from vmamba.medical.labelset import LabelSet
from vmamba.medical.losses import LabelLoss, deep_loss
from vmamba.medical.networks import logits

OPTIMISERS = {
    "sgd": lambda p, lr, decay: torch.optim.SGD(p, lr, momentum=0.99, nesterov=True, weight_decay=decay),
    "adamw": lambda p, lr, decay: torch.optim.AdamW(p, lr, weight_decay=decay),
}
CLIP = 12.0
KEEP = 0.9  # of the average of the epochs so far


@dataclass
class FoldSettings:
    """What decides a fold's training beside the plans; nnU-Net's values."""

    trainer: str = "nnUNetTrainerUMambaBot"
    network: dict[str, Any] = field(default_factory=dict)
    epochs: int = 1000
    iterations: int = 250
    val_iterations: int = 50
    batch_size: int | None = None
    patch: list[int] | None = None
    pretrained: str | None = None
    optimizer: str = "sgd"
    lr: float = 1e-2
    weight_decay: float = 3e-5
    augmentation: str = "standard"
    seed: int = 12345
    precision: str = "32-true"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class FoldModule(CapturedSteps):
    """(b, c, *patch) -> logits; label values (b, 1, *patch).

    Args:
        network: to be trained. labels: what its outputs mean.
        settings: of the training. batch_dice: Dice over the whole batch.

    On one GPU a step launches all its kernels at once (:class:`Captured`), unless ``captures`` is False.
    """

    def __init__(self, network: nn.Module, labels: LabelSet, settings: FoldSettings, batch_dice: bool) -> None:
        super().__init__()
        self.network, self.labels, self.settings = network, labels, settings
        self.loss = LabelLoss(labels, batch_dice)
        self.captured = Captured(self.loss_of, network)
        self.supervised = settings.network.get("deep_supervision", len(getattr(network, "outputs", ())) > 1)
        self.counts: Tensor | None = None
        self.average: float | None = None
        self.best = -math.inf
        self.history: dict[str, float] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Loss of a batch of patches."""
        image, label = batch
        loss = self.captured(image, label)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(image), sync_dist=True)
        return loss

    def loss_of(self, image: Tensor, label: Tensor) -> Tensor:
        """The loss of patches (b, c, *patch) with label values (b, 1, *patch)."""
        self.network.deep_supervision = self.supervised  # pyright: ignore[reportAttributeAccessIssue]
        maps = self.network(image) if self.supervised else logits(self.network, image)
        return deep_loss(self.loss, maps, label)

    def on_train_batch_start(self, *_: Any) -> None:
        """Drop path and dropout depend on (seed, step, rank), so that a resumed run draws the same."""
        key = self.settings.seed, self.global_step, self.global_rank
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def on_validation_epoch_start(self) -> None:
        """Forgets the counts of the last validation."""
        self.counts = torch.zeros(self.labels.outputs, 4, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Adds the patches to the pooled counts; ignored voxels count in none."""
        image, label = batch
        out = logits(self.network, image).float()
        valid = torch.ones_like(label, dtype=torch.bool) if self.labels.ignore is None else label != self.labels.ignore
        label = label.clamp(min=0) * valid
        if self.labels.order:
            predicted, truth = (out > 0).float(), self.labels.regions(label)
        else:
            classes = self.labels.outputs
            predicted, truth = one_hot(out.argmax(1, keepdim=True), classes), one_hot(label, classes)
        predicted, truth = (x.flatten(2).mT.flatten(0, 1)[valid.flatten()] for x in (predicted, truth))  # (n, k)
        assert self.counts is not None
        if len(truth):
            self.counts += get_confusion_matrix(predicted.T[None], truth.T[None])[0].double()

    def on_validation_epoch_end(self) -> None:
        """Dice of each target over all patches together, and the moving average of their mean."""
        assert self.counts is not None
        if self.trainer.world_size > 1:
            gathered = self.all_gather(self.counts)
            assert isinstance(gathered, Tensor)
            self.counts = gathered.reshape(-1, *self.counts.shape).sum(0)
        tp, fp, _, fn = self.counts[0 if self.labels.order else 1 :].unbind(1)
        dice = (2 * tp / (2 * tp + fp + fn)).tolist()
        present = [d for d in dice if not math.isnan(d)]
        mean = sum(present) / max(len(present), 1)
        self.average = mean if self.average is None else KEEP * self.average + (1 - KEEP) * mean
        self.history = {f"dice_{name}": d for name, d in zip(self.labels.names, dice, strict=True)}
        self.history["ema_dice"] = self.average
        self.log("val_dice", mean, prog_bar=True, rank_zero_only=False)

    def configure_optimizers(self) -> Any:
        """The optimiser and nnU-Net's polynomial schedule over epochs."""
        s = self.settings
        optimizer = OPTIMISERS[s.optimizer](self.parameters(), s.lr, s.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: max(1 - epoch / s.epochs, 0.0) ** 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The averages travel with the weights."""
        checkpoint["average"], checkpoint["best"] = self.average, self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And come back."""
        self.average, self.best = checkpoint["average"], checkpoint["best"]

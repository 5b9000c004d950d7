"""nnU-Net's losses in MONAI's terms: Dice + cross entropy for classes, sigmoid Dice + BCE for regions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss, MaskedDiceLoss
from torch import Tensor, nn

from vmamba.medical.labelset import LabelSet

SMOOTH = 1e-5


class LabelLoss(nn.Module):
    """(logits (b, k, ...), label values (b, 1, ...)) -> Dice loss - 1 + cross entropy; ignored voxels count in neither.

    Args:
        labels: classes or regions. batch_dice: Dice over the voxels of the whole batch, not of each image.
    """

    def __init__(self, labels: LabelSet, batch_dice: bool) -> None:
        super().__init__()
        self.labels, self.batch_dice = labels, batch_dice
        regions = labels.order is not None
        kind = DiceLoss if labels.ignore is None else MaskedDiceLoss
        what = {"include_background": regions, "sigmoid": regions, "softmax": not regions}
        self.dice = kind(**what, batch=batch_dice, smooth_nr=SMOOTH, smooth_dr=SMOOTH)  # pyright: ignore

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """A number."""
        valid = torch.ones_like(label, dtype=torch.bool) if self.labels.ignore is None else label != self.labels.ignore
        label = label.clamp(min=0) * valid
        masks = () if self.labels.ignore is None else (valid.float(),)
        if self.labels.order:
            target = self.labels.regions(label).to(logits.dtype)
            each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            entropy = (each * valid).sum() / (valid.sum().clamp(min=1) * logits.shape[1])
        else:
            target = F.one_hot(label[:, 0].long(), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
            each = F.cross_entropy(logits, label[:, 0].long(), reduction="none")
            entropy = (each * valid[:, 0]).sum() / valid.sum().clamp(min=1)
        return self.dice(logits, target, *masks) - 1 + entropy


def level_weights(levels: int) -> list[float]:
    """Weights 1, 1/2, 1/4, ... of the levels of deep supervision, the last 0 if there are several, their sum 1."""
    weights = [0.5**i for i in range(levels)]
    if levels > 1:
        weights[-1] = 0.0
    return [w / sum(weights) for w in weights]


def deep_loss(loss: nn.Module, maps: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
    """``loss`` of one map, or the weighted loss of several, finest first, against the label at their sizes."""
    if isinstance(maps, Tensor):
        return loss(maps.float(), label)
    total = torch.zeros((), device=label.device)
    for weight, logits in zip(level_weights(len(maps)), maps, strict=True):
        if weight:
            size = logits.shape[2:]
            smaller = label if label.shape[2:] == size else F.interpolate(label.float(), size, mode="nearest-exact")
            total = total + weight * loss(logits.float(), smaller.to(label.dtype))
    return total

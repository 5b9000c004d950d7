"""Losses of the published recipes, all MONAI's: (logits (b, k, h, w), classes (b, 1, h, w)) -> a number."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from monai.losses.dice import DiceCELoss, DiceLoss
from torch import Tensor, nn


class BceDice(nn.Module):
    """Of one output: binary cross entropy + Dice of each image, smoothed by 1 (VM-UNet's for ISIC)."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceLoss(sigmoid=True, smooth_nr=1, smooth_dr=1)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Logits (b, 1, h, w) of the foreground."""
        truth = label.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, truth) + self.dice(logits, truth)


_MIXED = partial(DiceCELoss, softmax=True, to_onehot_y=True, squared_pred=True, batch=True)
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "CE + Dice": _MIXED,  # over the softmax, all classes, squared denominators, whole batch (VM-UNet's for Synapse)
    "0.4 CE + 0.6 Dice": partial(_MIXED, lambda_ce=0.4, lambda_dice=0.6),  # MSVM-UNet's
    "BCE + Dice": BceDice,
}

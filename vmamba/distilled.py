"""Two classifiers on one feature vector, for training by distillation (DeiT, arXiv:2012.12877, section 4)."""

from typing import Any

from timm.layers import ClassifierHead, get_device_dtype
from torch import Tensor, nn


class DistilledHead(ClassifierHead):
    """timm's ``ClassifierHead`` with a second classifier, ``fc_dist``, which learns from a teacher.

    The logits are the mean of both; in training with ``distilled_training`` they are the pair (labels, teacher).
    """

    distilled_training = False

    def __init__(self, in_features: int, num_classes: int, *, device=None, dtype=None, **head):
        super().__init__(in_features, num_classes, device=device, dtype=dtype, **head)
        self._add(device=device, dtype=dtype)

    def _add(self, **dd) -> None:
        first = self.fc
        twin = nn.Linear(first.in_features, first.out_features, **dd) if isinstance(first, nn.Linear) else nn.Identity()
        self.fc_dist = twin.train(self.training)

    def reset(self, num_classes: int, pool_type: str | None = None, *args, **options) -> None:
        """Two new classifiers of ``num_classes`` (0: none), pooling as before unless ``pool_type`` is given."""
        dd: dict[str, Any] = get_device_dtype(self)
        super().reset(num_classes, pool_type, *args, **options)
        self._add(**dd)

    def forward(self, x: Tensor, pre_logits: bool = False) -> "Tensor | tuple[Tensor, Tensor]":
        """(b, h, w, c) -> (b, num_classes); the pooled features (b, c) with ``pre_logits`` or without classifiers."""
        pooled = super().forward(x, pre_logits=True)
        if pre_logits or isinstance(self.fc, nn.Identity):
            return pooled
        pair = self.fc(pooled), self.fc_dist(pooled)
        return pair if self.distilled_training and self.training else (pair[0] + pair[1]) / 2

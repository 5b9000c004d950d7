"""Whole slices through a network that wants multiples of 32: padding, MONAI's sliding window, cropping back."""

from collections.abc import Callable, Sequence

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor

from vmamba.medical.transforms import divisible, pad_to


def infer(network: Callable[[Tensor], Tensor], stack: Tensor, patch: Sequence[int], batch_size: int) -> Tensor:
    """Logits (s, k, h, w) float32 of the slices (s, c, h, w).

    Slices larger than ``patch`` are covered by half-overlapping windows with Gaussian weights.
    """
    padded, (rows, columns) = pad_to(stack, divisible(*stack.shape[-2:]))
    window = [min(p, n) for p, n in zip(patch, padded.shape[-2:], strict=True)]
    if list(padded.shape[-2:]) == window:
        logits = torch.cat([network(part).float() for part in padded.split(batch_size)])
    else:
        logits = sliding_window_inference(
            padded, window, batch_size, lambda part: network(part).float(), overlap=0.5, mode="gaussian"
        )
    assert isinstance(logits, Tensor)
    return logits[..., rows, columns]

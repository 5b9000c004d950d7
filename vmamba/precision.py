"""Mixed precision: what autocast does on a kind of device."""

import torch

KINDS = ("cpu", "cuda")  # autocast knows more, but raises for those that it does not know, such as meta


def autocasts(kind: str) -> bool:
    """Whether matrix products on devices of this kind (``tensor.device.type``) are cast to a narrower type now."""
    return kind in KINDS and torch.is_autocast_enabled(kind)

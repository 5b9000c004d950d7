"""From logits to files: back to the input's voxels, classes or regions decided, written in its geometry."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmamba.medical.labelset import LabelSet
from vmamba.medical.plan import Configuration
from vmamba.medical.preprocess import Crop
from vmamba.medical.resample import coarse_axis, resample_maps
from vmamba.medical.volume import original_axes, write_label
from vmamba.medical.written import save_probabilities


def file_probabilities(logits: Tensor, crop: Crop, labels: LabelSet, plans: dict[str, Any], c: Configuration) -> Tensor:
    """Probabilities (k, z, y, x) float32 in the voxels and axes of the case's file; background outside of the crop.

    Made where the logits lie, or in main memory if there is no space for them there.
    """
    try:
        return _file_probabilities(logits, crop, labels, plans, c)
    except torch.OutOfMemoryError:
        pass  # what the attempt holds is let go when this block ends
    torch.cuda.empty_cache()
    return _file_probabilities(logits.cpu(), crop, labels, plans, c)


def _file_probabilities(
    logits: Tensor, crop: Crop, labels: LabelSet, plans: dict[str, Any], c: Configuration
) -> Tensor:
    spacing = [*crop.spacing[: 3 - c.axes], *c.spacing]
    maps = labels.probabilities(resample_maps(logits, crop.shape, coarse_axis(crop.spacing, spacing)))
    if crop.shape != crop.whole:
        whole = maps.new_zeros(len(maps), *crop.whole)
        if labels.order is None:
            whole[0] = 1.0
        whole[(slice(None), *crop.slices)] = maps
        maps = whole
    return maps.permute(0, *(i + 1 for i in plans["transpose_backward"]))


def decided(probabilities: Tensor, labels: LabelSet, keep: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Label values (z, y, x), decided where the probabilities lie, and if ``keep`` these: both in main memory."""
    return labels.label_map(probabilities), probabilities.cpu().numpy() if keep else None


def save_case(target: Path, label: np.ndarray, probabilities: np.ndarray | None, like: Path) -> None:
    """Writes the mask, after NAME.npz with the probabilities if there are any: a mask says that its case is complete.

    Without them those of an earlier mask go.
    """
    save_probabilities(target, None if probabilities is None else original_axes(probabilities, like))
    write_label(target, label, like)

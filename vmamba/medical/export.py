"""From logits to files: back to the input's voxels, classes or regions decided, written in its geometry."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmamba.medical.labelset import LabelSet
from vmamba.medical.plan import Configuration
from vmamba.medical.preprocess import Crop
from vmamba.medical.resample import coarse_axis, resample
from vmamba.medical.safety import replacing
from vmamba.medical.volume import original_axes, write_label


def file_probabilities(
    logits: Tensor, crop: Crop, labels: LabelSet, plans: dict[str, Any], c: Configuration
) -> np.ndarray:
    """Probabilities (k, z, y, x) float32 in the voxels and axes of the case's file; background outside of the crop."""
    spacing = [*crop.spacing[: 3 - c.axes], *c.spacing]
    maps = resample(logits.numpy(), crop.shape, coarse_axis(crop.spacing, spacing), 1)
    inside = labels.probabilities(torch.from_numpy(maps)).numpy()
    whole = np.zeros((len(inside), *crop.whole), np.float32)
    if labels.order is None:
        whole[0] = 1.0
    whole[(slice(None), *crop.slices)] = inside
    return whole.transpose(0, *(i + 1 for i in plans["transpose_backward"]))


def save_case(target: Path, probabilities: np.ndarray, labels: LabelSet, like: Path, *, keep: bool) -> None:
    """Writes the mask, after NAME.npz with the probabilities if ``keep``: a mask says that its case is complete."""
    if keep:
        save_probabilities(target, original_axes(probabilities, like))
    write_label(target, labels.label_map(probabilities), like)


def save_probabilities(target: Path, probabilities: np.ndarray) -> None:
    """NAME.npz beside the mask ``target``, key ``probabilities``."""
    name = target.name.removesuffix(".gz").rsplit(".", 1)[0]
    with replacing(target.with_name(f"{name}.npz")) as partial:
        np.savez_compressed(partial, probabilities=probabilities)

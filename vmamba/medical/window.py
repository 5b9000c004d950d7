"""Whole volumes through a network of patches: MONAI's Gaussian sliding window, and the mean over mirrored windows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations

import torch
from monai.inferers.inferer import SlidingWindowInferer
from torch import Tensor

from vmamba.medical.model_folder import Trained
from vmamba.medical.networks import logits


@dataclass
class Window:
    """How a volume is covered: windows half a patch apart, mirrored along the axes seen in training."""

    step: float = 0.5
    mirror: bool = True
    batch: int = 4
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def mirrors(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of the axes, the empty one first."""
    return list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))


@torch.inference_mode()
def volume_logits(models: Sequence[Trained], data: Tensor, window: Window) -> Tensor:
    """Mean logits (k, z, y, x) of the models for an image (c, z, y, x); a 2D network sees every slice of z."""
    total = torch.zeros(())
    for model in models:
        flat = len(model.patch) == 2
        batch = data.transpose(0, 1) if flat else data[None]  # (n, c, *grid)
        out = _slide(model, batch, window)
        total = total + (out.transpose(0, 1) if flat else out[0])
    return total / len(models)


def _slide(model: Trained, batch: Tensor, window: Window) -> Tensor:
    flips = [[axis + 2 for axis in axes] for axes in (mirrors(model.mirrored) if window.mirror else [()])]

    def run(x: Tensor) -> Tensor:
        """The mean over mirrored windows; each sees the voxels that the window itself covers."""
        maps = (logits(model.network, x.flip(dims)).float().flip(dims) for dims in flips)
        return sum(maps, torch.zeros((), device=x.device)) / len(flips)

    def slide(device: torch.device) -> Tensor:
        inferer = SlidingWindowInferer(
            model.patch,
            window.batch,
            overlap=1 - window.step,
            mode="gaussian",
            sw_device=window.device,
            device=device,
            cache_roi_weight_map=False,
        )
        out = inferer(batch, run)
        assert isinstance(out, Tensor)
        return out.cpu()

    try:
        return slide(window.device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return slide(torch.device("cpu"))  # windows on the GPU, their sum in main memory

"""Whole volumes through a network of patches: MONAI's Gaussian sliding window, and the mean over mirrored windows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, combinations
from math import prod

import torch
from monai.inferers.inferer import SlidingWindowInferer
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.medical.model_folder import Trained
from vmamba.medical.networks import logits

VOXELS = {"cpu": 1 << 18, "cuda": 1 << 22}  # of the windows that go through the network at once
CAST = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
AUTO = "auto"


@dataclass
class Window:
    """How a volume is covered: windows half a patch apart, mirrored along the axes seen in training.

    ``batch`` windows go through the network at once; None: as many as :data:`VOXELS` holds, at least one.
    ``precision`` is one of :data:`CAST`; auto is bf16-mixed on a GPU that computes in bfloat16, 32-true elsewhere.
    Sums and logits are float32 whatever it is; they lie on the device while there is space, with ``host`` never.
    """

    step: float = 0.5
    mirror: bool = True
    batch: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = AUTO
    host: bool = False

    def __post_init__(self) -> None:
        if self.precision == AUTO:
            halves = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            self.precision = "bf16-mixed" if halves else "32-true"
        if self.precision not in CAST:
            raise UserError(f"--precision {self.precision}: unknown; choose from {AUTO}, {', '.join(CAST)}")

    def windows(self, patch: Sequence[int]) -> int:
        """How many windows of this size go through the network at once."""
        return self.batch or max(VOXELS.get(self.device.type, VOXELS["cpu"]) // prod(patch), 1)


def mirrors(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of the axes, the empty one first."""
    return list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))


@torch.inference_mode()
def volume_logits(models: Sequence[Trained], data: Tensor, window: Window) -> Tensor:
    """Mean logits (k, z, y, x) of the models for an image (c, z, y, x); a 2D network sees every slice of z.

    They lie on the window's device, or in main memory if that is wished or there is no space for them there.
    """
    total = None
    for model in models:
        flat = len(model.patch) == 2
        batch = data.transpose(0, 1) if flat else data[None]  # (n, c, *grid)
        out = _slide(model, batch, window)
        out = out.transpose(0, 1) if flat else out[0]
        total = out if total is None else total.to(out.device).add_(out)
    if total is None:
        raise ValueError("expected at least one model")
    return total.div_(len(models))


def _slide(model: Trained, batch: Tensor, window: Window) -> Tensor:
    """Logits (n, k, *grid); where memory does not suffice, fewer windows at once, then their sum in main memory."""
    count, host = window.windows(model.patch), torch.device("cpu")
    place = host if window.host else window.device
    flips = [tuple(axis + 2 for axis in axes) for axes in (mirrors(model.mirrored) if window.mirror else [()])]
    run = _network(model.network, flips, window)
    for together in dict.fromkeys((count, max(count // 4, 1))):
        try:
            return _cover(run, model, batch, window, together, place)
        except torch.OutOfMemoryError:
            pass  # what the attempt holds is let go when this block ends
        torch.cuda.empty_cache()
    return _cover(run, model, batch, window, 1, host)


def _network(network: nn.Module, flips: Sequence[tuple[int, ...]], window: Window) -> Callable[[Tensor], Tensor]:
    kind, half = window.device.type, CAST[window.precision]

    def run(x: Tensor) -> Tensor:
        """The mean over mirrored windows; each sees the voxels that the window itself covers."""
        total = None
        with torch.autocast(kind, half, enabled=half != torch.float32):
            for dims in flips:
                out = logits(network, x.flip(dims) if dims else x).float()
                out = out.flip(dims) if dims else out
                total = out if total is None else total.add_(out)
        assert total is not None
        return total.div_(len(flips))

    return run


def _cover(
    run: Callable[[Tensor], Tensor], model: Trained, batch: Tensor, window: Window, together: int, device: torch.device
) -> Tensor:
    """Logits on ``device``, where the windows' sum is kept."""
    inferer = SlidingWindowInferer(
        model.patch,
        together,
        overlap=1 - window.step,
        mode="gaussian",
        sw_device=window.device,
        device=device,
        cache_roi_weight_map=False,
    )
    with _tuned():
        out = inferer(batch.to(device), run)
    assert isinstance(out, Tensor)
    return out


@contextmanager
def _tuned() -> Iterator[None]:
    """cuDNN tries its algorithms for the windows' shape, which stays the same."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before

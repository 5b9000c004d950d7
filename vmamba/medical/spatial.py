"""nnU-Net's spatial augmentation: patches cut out of larger ones, now and then turned and scaled.

MONAI's ``RandAffine`` would resample the larger patch, once to turn and once to scale it; here the patch itself is
resampled, once, and where slices stay in their planes as so many pictures.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms.transform import MapTransform, Randomizable
from torch import Tensor
from torch.nn import functional as F

PROBABILITY = 0.2  # of turning, and of scaling
SCALE = 0.7, 1.4


class RandPatchd(Randomizable, MapTransform):
    """A central patch of maps (c, *grid), perhaps turned about its centre and scaled; zeros from beyond the grid.

    Args:
        modes: how maps are resampled, by key: ``bilinear`` or ``nearest``.
        patch: sides of the result. angles: the largest in radians, about each axis of a volume, or one of an image.
        flat: a volume's slices stay in their planes.
    """

    def __init__(
        self, modes: Mapping[Hashable, str], patch: Sequence[int], angles: Sequence[float], flat: bool
    ) -> None:
        super().__init__(list(modes))
        self.modes, self.patch, self.angles, self.flat = modes, tuple(patch), tuple(angles), flat

    def randomize(self, data: Any = None) -> None:
        """Draws :attr:`matrix`: from places in the patch, about its centre, to places in the map; None for neither."""
        axes, self.matrix = len(self.patch), None
        turned, scaled = (self.R.uniform() < PROBABILITY for _ in range(2))
        if turned or scaled:
            self.matrix = torch.eye(axes, dtype=torch.float64)
        if turned:
            self.matrix = rotation([self.R.uniform(-angle, angle) for angle in self.angles])
        if scaled and self.matrix is not None:
            factors = [self.R.uniform(*SCALE) for _ in range(axes)]
            factors[0] = 1.0 if self.flat else factors[0]
            self.matrix = self.matrix @ torch.tensor(factors, dtype=torch.float64).diag()

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """{key: (c, *grid)} -> {key: (c, *patch)}"""
        self.randomize()
        how = self.patch, self.matrix
        return {**data, **{key: resampled(data[key], *how, mode, self.flat) for key, mode in self.modes.items()}}


def rotation(angles: Sequence[float]) -> Tensor:
    """The matrix that turns about each axis of a volume in order, or by one angle in an image; float64."""
    axes = 2 if len(angles) == 1 else 3
    matrix = torch.eye(axes, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        one = torch.eye(axes, dtype=torch.float64)
        i, j = [side for side in range(axes) if axes == 2 or side != axis]
        one[i, i] = one[j, j] = math.cos(angle)
        one[j, i] = math.sin(angle)
        one[i, j] = -one[j, i]
        matrix = matrix @ one
    return matrix


def resampled(x: Tensor, patch: Sequence[int], matrix: Tensor | None, mode: str, flat: bool = False) -> Tensor:
    """The central ``patch`` of x (c, *grid), whose pixel at ``o`` from its centre is x at ``matrix o``.

    Args:
        matrix: (axes, axes); None for the pixels as they are. mode: ``bilinear`` (also of volumes) or ``nearest``.
        flat: slices stay in their planes: the first axis is cut alone.
    """
    starts = [n // 2 - m // 2 for n, m in zip(x.shape[1:], patch, strict=True)]
    if matrix is None:
        return x[(slice(None), *(slice(s, s + m) for s, m in zip(starts, patch, strict=True)))]
    if flat:
        slices = x[:, starts[0] : starts[0] + patch[0]]
        return resampled(slices.flatten(0, 1), patch[1:], matrix[1:, 1:], mode).unflatten(0, (len(x), patch[0]))
    sides, sizes = (torch.tensor(n, dtype=torch.float64) for n in (x.shape[1:], patch))
    shift = (2 * torch.tensor(starts) + sizes) / sides - 1  # the patch's centre, where -1 and 1 are the map's edges
    theta = torch.cat([matrix * sizes / sides[:, None], shift[:, None]], 1)
    theta = torch.cat([theta[:, :-1].flip(0, 1), theta[:, -1:].flip(0)], 1)  # PyTorch's order of axes
    grid = F.affine_grid(theta[None].float(), [1, 1, *patch], align_corners=False)
    return F.grid_sample(x[None], grid, mode, "zeros", align_corners=False)[0]

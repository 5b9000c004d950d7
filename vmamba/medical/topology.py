"""nnU-Net's rule from patch size and spacing to strides and kernels, and the size of its U-Net's feature maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod

import numpy as np

SMALLEST = 4  # the shortest side of the deepest map
FEATURES = 32
MOST_FEATURES = {2: 512, 3: 320}
CONVOLUTIONS = 2  # per stage, in encoder and decoder


@dataclass(frozen=True)
class Topology:
    """Strides and kernels of each stage, and the patch padded to what the strides divide."""

    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """What the sides of a patch must be multiples of."""
        return tuple(prod(axis) for axis in zip(*self.strides, strict=True))

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of each stage."""
        most = MOST_FEATURES[len(self.patch)]
        return tuple(min(FEATURES * 2**i, most) for i in range(len(self.strides)))

    def map_size(self, classes: int) -> int:
        """Numbers in all convolutions' outputs of nnU-Net's plain U-Net for one patch: its estimate of memory."""
        sizes = [self.patch]
        for stride in self.strides[1:]:
            sizes.append(tuple(n // s for n, s in zip(sizes[-1], stride, strict=True)))
        stages = list(zip(self.features, sizes, strict=True))
        encoder = sum(CONVOLUTIONS * c * prod(size) for c, size in stages)
        decoder = sum((CONVOLUTIONS + 1) * c * prod(size) for c, size in stages[:-1])  # and the transposed one
        return encoder + decoder + classes * prod(self.patch)


def topology(spacing: Sequence[float] | np.ndarray, patch: Sequence[int]) -> Topology:
    """Halve every axis of at least 8 voxels that is within a factor of 2 of the finest, until none is left.

    An axis has kernel 1 until its voxels are at most twice as long as the shortest, then 3.
    """
    axes = range(len(patch))
    lengths, sides = [float(s) for s in spacing], list(patch)
    kernel = [1] * len(patch)
    strides, kernels = [(1,) * len(patch)], []
    while True:
        long = [i for i in axes if sides[i] >= 2 * SMALLEST]
        finest = min((lengths[i] for i in long), default=0.0)
        halved = [i for i in long if lengths[i] / finest < 2]
        if not halved or (len(halved) == 1 and sides[halved[0]] < 3 * SMALLEST):
            break
        kernel = [3 if kernel[i] == 3 or lengths[i] / min(lengths) < 2 else 1 for i in axes]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if i in halved else 1 for i in axes))
        for i in halved:
            lengths[i] *= 2
            sides[i] = ceil(sides[i] / 2)
    kernels.append((3,) * len(patch))
    divisor = [prod(axis) for axis in zip(*strides, strict=True)]
    padded = tuple(-(-n // d) * d for n, d in zip(patch, divisor, strict=True))
    return Topology(tuple(strides), tuple(kernels), padded)


def architecture(plan: Topology) -> dict:
    """The ``architecture`` entry of plans.json: nnU-Net's plain U-Net with this topology."""
    axes = len(plan.patch)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": len(plan.strides),
            "features_per_stage": list(plan.features),
            "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
            "kernel_sizes": [list(k) for k in plan.kernels],
            "strides": [list(s) for s in plan.strides],
            "n_conv_per_stage": [CONVOLUTIONS] * len(plan.strides),
            "n_conv_per_stage_decoder": [CONVOLUTIONS for _ in pairwise(plan.strides)],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }

"""Augmentation of the published recipes in MONAI's transforms, for {"image": (c, h, w), "label": (1, h, w)}."""

from collections.abc import Callable, Hashable, Mapping
from math import pi
from typing import Any

import torch
from monai.transforms.compose import SomeOf
from monai.transforms.intensity.dictionary import RandGaussianNoised, RandGaussianSmoothd, RandScaleIntensityd
from monai.transforms.spatial.dictionary import Rand2DElasticd, RandAffined, RandFlipd, RandRotated
from monai.transforms.transform import MapTransform, RandomizableTransform

KEYS = ("image", "label")
_WARP = {"mode": ("bilinear", "nearest"), "padding_mode": "zeros"}
_20 = pi / 9


class TurnOrRotate(RandomizableTransform, MapTransform):
    """With 0.5 a quarter turn or several and a flip, else with 0.5 a rotation by up to 20 degrees (TransUNet's)."""

    def __init__(self) -> None:
        MapTransform.__init__(self, KEYS)
        RandomizableTransform.__init__(self, 1.0)
        self.rotate = RandRotated(KEYS, range_x=_20, prob=1.0, keep_size=True, **_WARP)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> "TurnOrRotate":
        """One state for both halves."""
        super().set_random_state(seed, state)
        self.rotate.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Square images keep their size; others are turned by 180 degrees or not at all."""
        turn, flip, kind = int(self.R.randint(4)), int(self.R.randint(2)), self.R.rand(2)
        if kind[0] < 0.5:
            h, w = data["image"].shape[-2:]
            turn = turn if h == w else turn // 2 * 2
            both = {key: torch.flip(torch.rot90(data[key], turn, (-2, -1)), (flip - 2,)) for key in KEYS}
            return {**data, **both}
        return dict(self.rotate(data)) if kind[1] < 0.5 else dict(data)


def _msvm() -> list:
    always: dict[str, Any] = {"prob": 1.0}
    warp: dict[str, Any] = {"mode": ("bilinear", "nearest"), "padding_mode": ("border", "zeros"), **always}
    return [
        SomeOf(
            [
                RandFlipd(KEYS, prob=0.5, spatial_axis=0),
                RandFlipd(KEYS, prob=0.5, spatial_axis=1),
                RandGaussianNoised("image", std=0.05, **always),
                RandGaussianSmoothd("image", sigma_x=(0.25, 1.0), sigma_y=(0.25, 1.0), **always),
                RandScaleIntensityd("image", factors=0.5, **always),  # a contrast, as 0 is the middle
                RandAffined(KEYS, scale_range=((-0.5, 1.0), (-0.5, 1.0)), **warp),
                RandAffined(KEYS, rotate_range=2 * _20, **warp),
                RandAffined(KEYS, shear_range=(0.28, 0.28), **warp),
                Rand2DElasticd(KEYS, spacing=(32, 32), magnitude_range=(0, 4), **warp),
                RandAffined(KEYS, translate_range=(45, 45), **warp),
            ],
            num_transforms=(0, 4),
        )
    ]


RECIPE_AUGMENTATIONS: dict[str, Callable[[], list]] = {
    "vmunet-isic": lambda: [
        RandFlipd(KEYS, prob=0.5, spatial_axis=1),
        RandFlipd(KEYS, prob=0.5, spatial_axis=0),
        RandRotated(KEYS, range_x=pi, prob=0.5, keep_size=True, **_WARP),
    ],
    "transunet": lambda: [TurnOrRotate()],
    "msvm": _msvm,
}

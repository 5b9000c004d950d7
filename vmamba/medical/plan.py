"""From fingerprint to plans: spacing, axes, patch and batch size of each configuration, by nnU-Net's rules.

The file is nnU-Net's nnUNetPlans.json, so that either program can read the other's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np

from vmamba.errors import UserError
from vmamba.medical.raw import RawDataset
from vmamba.medical.topology import Topology, architecture, topology
from vmamba.medical.volume import FLAT

ANISOTROPIC = 3.0  # an axis this much coarser than the others is treated apart
REFERENCE = {2: (8.5e7, 12), 3: (5.6e8, 2)}  # feature-map size and its batch at 8 GB
START = {2: 2048**2, 3: 256**3}
REFERENCE_GB = 8.0
SHOWN = 0.25  # share of an image that a patch must show, else there is a 3d_lowres
COARSER = 1.03  # step in the search for its voxels
COVERED = 0.05  # share of the data set's voxels that a batch may hold
SCHEMES = {
    "ct": "CTNormalization",
    "nonorm": "NoNormalization",
    "zscore": "ZScoreNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}
_RESAMPLE = {"order_z": 0, "force_separate_z": None}


def make_plans(
    dataset: RawDataset,
    found: dict[str, Any],
    name: str,
    memory: float = REFERENCE_GB,
    spacing: Sequence[float] | None = None,
) -> dict[str, Any]:
    """plans.json as a dictionary, for 2d and, unless the images are flat, 3d_fullres and perhaps 3d_lowres.

    Args:
        dataset: whose labels and channels it is for. found: its fingerprint.
        name: the plans' name. memory: GPU memory to plan for, in GB.
        spacing: mm of a voxel along z, y, x that 3d_fullres has, and 2d in its plane; None: by the rules.
    """
    spacings, shapes = np.array(found["spacings"], float), np.array(found["shapes_after_crop"], float)
    target = target_spacing(spacings, shapes) if spacing is None else _asked(spacing, spacings, shapes)
    coarsest = int(np.argmax(target))
    forward = [coarsest, *(i for i in range(3) if i != coarsest)]
    resampled = np.rint(shapes * spacings / target)
    median = np.median(resampled, 0)[forward]
    masked = found["median_relative_size_after_cropping"] < 0.75
    schemes = [SCHEMES.get(channel.casefold(), "ZScoreNormalization") for channel in dataset.channels]
    common = {
        "preprocessor_name": "DefaultPreprocessor",
        "normalization_schemes": schemes,
        "use_mask_for_norm": [masked and scheme == "ZScoreNormalization" for scheme in schemes],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **_RESAMPLE},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **_RESAMPLE},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **_RESAMPLE},
    }
    labels = len(dataset.json["labels"])
    sizes = Sizes(target[forward], median, labels, len(shapes), memory)
    configurations = {}
    for key, (fitted, dice) in sizes.configurations().items():
        configurations[key] = {
            "data_identifier": f"{name}_{key}",
            "batch_size": fitted.batch,
            "patch_size": list(fitted.plan.patch),
            "median_image_size_in_voxels": fitted.median,
            "spacing": fitted.spacing,
            "batch_dice": dice,
            "architecture": architecture(fitted.plan),
            **common,
        }
    return {
        "dataset_name": dataset.name,
        "plans_name": name,
        "original_median_spacing_after_transp": np.median(spacings, 0)[forward].tolist(),
        "original_median_shape_after_transp": [round(n) for n in np.median(shapes, 0)[forward]],
        "image_reader_writer": "SimpleITKIO" if dataset.ending.startswith(".nii") else "NaturalImage2DIO",
        "transpose_forward": forward,
        "transpose_backward": [forward.index(i) for i in range(3)],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": found["foreground_intensity_properties_per_channel"],
    }


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """The median spacing (n, 3) -> (3,); on a far coarser and far shorter axis the 10th percentile."""
    target, size = np.percentile(spacings, 50, 0), np.percentile(shapes, 50, 0)
    worst = int(np.argmax(target))
    others = [i for i in range(3) if i != worst]
    coarsest = max(target[others])
    if target[worst] > ANISOTROPIC * coarsest and size[worst] * ANISOTROPIC < min(size[others]):
        fine = np.percentile(spacings[:, worst], 10)
        target[worst] = fine if fine >= coarsest else coarsest + 1e-5
    return target


def check_spacing(spacing: Sequence[float]) -> None:
    """UserError unless it is three lengths."""
    if len(spacing) != 3 or not all(isfinite(n) and n > 0 for n in spacing):
        raise UserError(f"{_option(spacing)}: expected three numbers above 0, the mm of a voxel along z, y and x")


def _asked(target: Sequence[float], spacings: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """``target`` (3,), after checking that images of these spacings (n, 3) and shapes (n, 3) can have it: UserError."""
    check_spacing(target)
    if (spacings[:, 0] == FLAT).all() and target[0] != FLAT:
        flat = _option([FLAT, *target[1:]])
        raise UserError(f"{_option(target)}: the images are flat, nothing lies along z; expected {flat}")
    sizes = np.rint(shapes * spacings / target)
    least = np.unravel_index(sizes.argmin(), sizes.shape)
    if sizes[least] < 1:
        side = f"{shapes[least] * spacings[least]:g} mm along {'zyx'[least[1]]}"
        raise UserError(f"{_option(target)}: leaves nothing of an image of {side}; expected smaller voxels")
    return np.array(target, float)


def _option(spacing: Sequence[float]) -> str:
    return f"-overwrite_target_spacing {' '.join(f'{n:g}' for n in spacing)}"


@dataclass(frozen=True)
class Fitted:
    """Patch and batch for images of a spacing and a median size."""

    plan: Topology
    batch: int
    spacing: list[float]
    median: list[float]

    @property
    def share(self) -> float:
        """Of the median image in a patch."""
        return prod(self.plan.patch) / prod(self.median)


@dataclass(frozen=True)
class Sizes:
    """Of a data set: target spacing and median size, coarsest axis first; labels, cases and GB to plan for."""

    spacing: np.ndarray
    median: np.ndarray
    labels: int
    cases: int
    memory: float

    def configurations(self) -> dict[str, tuple[Fitted, bool]]:
        """Each configuration, and whether its Dice takes the whole batch: where a patch shows little of an image."""
        found = {"2d": (self._fit(self.spacing, self.median, 2), True)}
        if self.median[0] > 1:
            full = self._fit(self.spacing, self.median, 3)
            low = self._low(full)
            if low:
                found["3d_lowres"] = (low, False)
            found["3d_fullres"] = (full, low is not None)
        return found

    def _fit(self, spacing: np.ndarray, median: np.ndarray, axes: int) -> Fitted:
        voxels = float(np.prod(median)) * self.cases
        cut = slice(3 - axes, None)
        plan, batch = fit_memory(spacing[cut], median[cut], self.labels, voxels, self.memory)
        return Fitted(plan, batch, spacing[cut].tolist(), median[cut].tolist())

    def _low(self, full: Fitted) -> Fitted | None:
        """Coarser voxels until a patch shows a quarter of an image; None if that takes less than half of the voxels."""
        spacing, low = self.spacing.copy(), full
        while low.share < SHOWN:
            fine = spacing.max() / spacing > 2
            spacing[fine if fine.any() else slice(None)] *= COARSER
            low = self._fit(spacing, np.rint(self.spacing / spacing * self.median), 3)
        return low if np.prod(spacing / self.spacing) >= 2 else None


def fit_memory(
    spacing: np.ndarray, median: np.ndarray, labels: int, voxels: float, memory: float
) -> tuple[Topology, int]:
    """The largest patch whose feature maps fit ``memory`` twice, and the batch size that then fits."""
    axes = len(spacing)
    inverse = 1 / spacing
    start = np.rint(inverse * (START[axes] / np.prod(inverse)) ** (1 / axes))
    plan = topology(spacing, [int(n) for n in np.minimum(start, median)])
    budget, batch = REFERENCE[axes]
    budget *= memory / REFERENCE_GB
    while plan.map_size(labels) / batch * 2 > budget:
        axis = int(np.argsort([p / m for p, m in zip(plan.patch, median, strict=True)])[-1])
        smaller = list(plan.patch)
        smaller[axis] -= plan.divisor[axis]
        step = topology(spacing, smaller).divisor[axis]
        sides = list(plan.patch)
        sides[axis] -= step
        plan = topology(spacing, sides)
    fitting = round(budget / plan.map_size(labels) * batch)
    return plan, max(min(fitting, round(voxels * COVERED / prod(plan.patch))), 2)


@dataclass(frozen=True)
class Configuration:
    """One configuration of a plans file, of today's form or of nnU-Net 2.1's."""

    name: str
    identifier: str
    patch: tuple[int, ...]
    batch: int
    spacing: tuple[float, ...]
    schemes: tuple[str, ...]
    masked: tuple[bool, ...]
    batch_dice: bool
    features: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    convolutions: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def axes(self) -> int:
        """2, or 3."""
        return len(self.patch)


def configuration(plans: dict[str, Any], name: str, source: str) -> Configuration:
    """A configuration by name, with what it inherits; UserError if it is missing, incomplete or a cascade."""
    known = plans.get("configurations", {})
    if name not in known:
        raise UserError(f"{source}: no configuration {name!r}; choose from {', '.join(known) or 'none'}")
    c = dict(known[name])
    while parent := c.pop("inherits_from", None):
        c = {**known[parent], **c}
    if c.get("previous_stage"):
        raise UserError(
            f"{source}: {name} is the second stage of a cascade, which this program has not; use 3d_fullres"
        )
    try:
        return parse(name, c)
    except (KeyError, TypeError) as error:
        raise UserError(f"{source}: configuration {name} is incomplete ({error})") from error


def parse(name: str, c: dict[str, Any]) -> Configuration:
    """A configuration's dictionary, of either form of plans; KeyError or TypeError if it lacks something."""
    return Configuration(
        name,
        c["data_identifier"],
        tuple(c["patch_size"]),
        c["batch_size"],
        tuple(c["spacing"]),
        tuple(c["normalization_schemes"]),
        tuple(c["use_mask_for_norm"]),
        c.get("batch_dice", False),
        *_stages(c),
    )


def _stages(c: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Features, kernels, strides and convolutions of either form of plans."""
    if "architecture" in c:
        a = c["architecture"]["arch_kwargs"]
        features, kernels, strides = a["features_per_stage"], a["kernel_sizes"], a["strides"]
        encoder = a.get("n_conv_per_stage", a.get("n_blocks_per_stage"))
        decoder = a["n_conv_per_stage_decoder"]
    else:
        strides, kernels = c["pool_op_kernel_sizes"], c["conv_kernel_sizes"]
        base, most = c["UNet_base_num_features"], c["unet_max_num_features"]
        features = [min(base * 2**i, most) for i in range(len(strides))]
        encoder, decoder = c["n_conv_per_stage_encoder"], c["n_conv_per_stage_decoder"]
    kernels, strides = (tuple(tuple(row) for row in table) for table in (kernels, strides))
    return tuple(features), kernels, strides, (tuple(encoder), tuple(decoder))

"""What decides a pre-training: MambaMIM's published values, and what no pre-training could use."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.medical.checks import PRECISIONS
from vmamba.medical.runs import read_json

TOKI = {"corrected": False, "official": True}  # whether the interpolated tokens are scrambled, as in the code
MASKS = ("sample", "batch")
NORMALISATIONS = {
    "zscore": "ZScoreNormalization",
    "minmax": "RescaleTo01Normalization",
    "none": "NoNormalization",
}


@dataclass
class PretrainSettings:
    """Stored as RUN/config.json and compared on --resume.

    Images come from ``dataset`` (with ``configuration``, ``fold``, ``plans`` and the further folders ``images``), or
    from the folder ``data`` (with ``axis``, ``normalisation``, ``window``, ``spacing``).
    """

    dataset: str | None = None
    configuration: str | None = None
    fold: str = "all"
    plans: str = "nnUNetPlans"
    images: list[str] = field(default_factory=list)
    data: str | None = None
    axis: int = 2
    normalisation: str = "zscore"
    window: list[float] | None = None
    spacing: list[float] | None = None
    network: str = "hymamba"
    options: dict[str, Any] = field(default_factory=dict)
    mask_ratio: float = 0.75
    masks: str = "sample"
    toki: str = "corrected"
    width: int = 768
    patch: list[int] | None = None
    batch_size: int | None = None
    epochs: int = 100
    iterations: int = 250
    lr: float = 1e-4
    warmup: float = 0.4  # 40 of 100 epochs
    weight_decay: float = 0.04
    last_weight_decay: float = 0.2
    seed: int = 12345
    precision: str = "32-true"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return asdict(self)


_NAMED = {"toki": TOKI, "masks": MASKS, "normalisation": NORMALISATIONS, "precision": PRECISIONS}
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mask_ratio": (lambda v: 0 < v < 1, "a share between 0 and 1, such as 0.75"),
    "width": (lambda v: v >= 2, "at least 2"),
    "batch_size": (lambda v: v is None or v >= 1, "at least 1"),
    "epochs": (lambda v: v >= 1, "at least 1"),
    "iterations": (lambda v: v >= 1, "at least 1"),
    "lr": (lambda v: v > 0, "a rate above 0, such as 1e-4"),
    "warmup": (lambda v: 0 <= v < 1, "a share of the steps, 0 or more and below 1"),
    "weight_decay": (lambda v: v >= 0, "0 or more"),
    "last_weight_decay": (lambda v: v >= 0, "0 or more"),
    "seed": (lambda v: v >= 0, "0 or more"),
    "patch": (lambda v: v is None or min(v) >= 1, "sides of 1 or more"),
    "window": (lambda v: v is None or v[0] < v[1], "LOW HIGH with LOW below HIGH, such as -175 250"),
    "spacing": (lambda v: v is None or (min(v) > 0 and len(v) in (1, 3)), "one or three sides of a voxel in mm"),
}


def check_pretraining(settings: PretrainSettings) -> None:
    """UserError for a name or a number that no pre-training could use."""
    for name, table in _NAMED.items():
        if getattr(settings, name) not in table:
            raise UserError(f"--{name} {getattr(settings, name)}: unknown; choose from {', '.join(table)}")
    for name, (fits, wanted) in _RANGES.items():
        value = getattr(settings, name)
        if not fits(value):
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            raise UserError(f"--{name.replace('_', '-')} {shown}: expected {wanted}")


def resumed(run: Path, given: dict[str, Any]) -> PretrainSettings:
    """The stored settings of a run to continue; UserError if there is none or an option given now differs."""
    path = run / "config.json"
    if not path.exists() or not (run / "last.ckpt").exists():
        raise UserError(f"{run}: no pre-training to resume (config.json and last.ckpt); start it without --resume")
    try:
        stored = PretrainSettings(**read_json(path)["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the configuration of a pre-training of this version ({error})") from error
    was = stored.as_dict()
    known = {f.name for f in fields(PretrainSettings)}
    differing = [f"{k}={was[k]} (now {v})" for k, v in given.items() if k in known and v != was[k]]
    if differing:
        raise UserError(f"{run}: was started with {', '.join(differing)}; resume without these options")
    return stored

"""Settings that cannot work, said before anything is read or written."""

from collections.abc import Callable
from typing import Any

from vmamba.errors import UserError
from vmamba.medical.spec import PRESETS, Settings
from vmamba.medical.transforms import AUGMENTATIONS, NORMALISATIONS

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
_NAMED = {"preset": PRESETS, "normalisation": NORMALISATIONS, "augmentation": AUGMENTATIONS, "precision": PRECISIONS}
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda v: v >= 1, "at least 1"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "lr": (lambda v: v > 0, "a rate above 0, such as 1e-3"),
    "min_lr": (lambda v: v >= 0, "a rate of 0 or more"),
    "weight_decay": (lambda v: v >= 0, "0 or more"),
    "val_fraction": (lambda v: 0 < v < 1, "a share between 0 and 1"),
    "seed": (lambda v: v >= 0, "0 or more"),
    "patch": (lambda v: v is None or len(v) in (1, 2), "one or two numbers"),
    "max_minutes": (lambda v: v is None or v > 0, "a time above 0"),
}


def check_settings(settings: Settings) -> None:
    """UserError for a name or a number that no training could use."""
    for name, table in _NAMED.items():
        value = getattr(settings, name)
        if value not in table:
            raise UserError(f"--{name} {value}: unknown; choose from {', '.join(table)}")
    for name, (fits, wanted) in _RANGES.items():
        if not fits(getattr(settings, name)):
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected {wanted}")
    if settings.preset != "published" and not settings.model.startswith("vmunet"):
        raise UserError(f"--preset {settings.preset}: is for vmunet, not {settings.model}; use --set KEY=VALUE")

"""Settings that cannot work, said before anything is read or written."""

from collections.abc import Callable, Collection
from typing import Any

from vmamba.errors import UserError
from vmamba.medical.fold_module import OPTIMISERS, FoldSettings
from vmamba.medical.jobs import Job
from vmamba.medical.networks import TRAINERS, network_name
from vmamba.medical.patches import AUGMENTATIONS as FOLD_AUGMENTATIONS
from vmamba.medical.plan import Configuration, configuration
from vmamba.medical.preprocess import rules
from vmamba.medical.raw import read_dataset_json
from vmamba.medical.recipes import RECIPES
from vmamba.medical.spec import PRESETS, Settings
from vmamba.medical.transforms import AUGMENTATIONS, NORMALISATIONS

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
_NAMED = {"recipe": RECIPES, "normalisation": NORMALISATIONS, "augmentation": AUGMENTATIONS, "precision": PRECISIONS}
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda v: v >= 1, "at least 1"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "lr": (lambda v: v > 0, "a rate above 0, such as 1e-3"),
    "min_lr": (lambda v: v >= 0, "a rate of 0 or more"),
    "weight_decay": (lambda v: v >= 0, "0 or more"),
    "val_fraction": (lambda v: 0 <= v < 1, "a share between 0 and 1"),
    "seed": (lambda v: v >= 0, "0 or more"),
    "size": (lambda v: v is None or (len(v) == 2 and min(v) >= 1), "height and width"),
    "patch": (lambda v: v is None or len(v) in (1, 2), "one or two numbers"),
    "max_minutes": (lambda v: v is None or v > 0, "a time above 0"),
}


def check_settings(settings: Settings) -> None:
    """UserError for a name or a number that no training could use."""
    check_preset(settings.preset, settings.model)
    for name, table in _NAMED.items():
        value = getattr(settings, name)
        if value not in table:
            raise UserError(f"--{name} {value}: unknown; choose from {', '.join(table)}")
    for name, (fits, wanted) in _RANGES.items():
        if not fits(getattr(settings, name)):
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected {wanted}")


def check_preset(preset: str, network: str) -> dict[str, Any]:
    """The options of a preset; UserError if there is none of this name, or none for this network."""
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown; choose from {', '.join(PRESETS)}")
    if PRESETS[preset] and not TRAINERS.get(network, network).startswith("vmunet"):
        raise UserError(f"--preset {preset}: is for vmunet, not {network}; use --set KEY=VALUE")
    return PRESETS[preset]


def check_fold(settings: FoldSettings, c: Configuration) -> None:
    """UserError for a name or a number that no training of a fold could use."""
    named = {"augmentation": FOLD_AUGMENTATIONS, "precision": PRECISIONS, "optimizer": OPTIMISERS}
    for name, table in named.items():
        if getattr(settings, name) not in table:
            raise UserError(f"--{name} {getattr(settings, name)}: unknown; choose from {', '.join(table)}")
    for name in ("epochs", "iterations", "val_iterations", "batch_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    for name in ("lr", "weight_decay", "seed"):
        fits, wanted = _RANGES[name]
        if not fits(getattr(settings, name)):
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected {wanted}")
    if settings.patch and (len(settings.patch) != c.axes or min(settings.patch) < 1):
        raise UserError(f"--patch {' '.join(map(str, settings.patch))}: {c.name} needs {c.axes} sides")
    network_name(settings.trainer, c.axes)


def check_plans(job: Job, replaced: Collection[str]) -> None:
    """UserError if folds other than those to be ``replaced`` were trained by plans that differ from today's."""
    path, name = job.folder / "plans.json", job.configuration.name
    trained = {file.parent.name for file in job.folder.glob("fold_*/checkpoint_*")}
    others = sorted(trained - {f"fold_{fold}" for fold in replaced})
    if not others or not path.exists():
        return
    plans = read_dataset_json(path)
    before = configuration(plans, name, str(path))
    if (before, rules(plans, before)) != (job.configuration, rules(job.plans, job.configuration)):
        advice = "remove these folds, or name the new plans otherwise (-p of plan, preprocess and train)"
        raise UserError(f"{job.folder}: {', '.join(others)} trained by other plans than these are now; {advice}")

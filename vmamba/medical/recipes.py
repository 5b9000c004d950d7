"""How the 2D papers train, by name: ``vmamba medseg train --recipe NAME``; options of the command line override.

A recipe is what the options of a training default to, and what has no option: loss, size, schedule, how the best
checkpoint is chosen. The sources are the papers' code; what differs here stands in docs/medseg.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.medical.layouts import find_layout
from vmamba.medical.spec import Settings

BEST = {"val_dice": "max", "val_loss": "min", "train_loss": "min"}


@dataclass(frozen=True)
class Recipe:
    """One published training.

    Args:
        words: paper and data set.
        settings: values of :class:`Settings` where none is given.
        network: options of the published network.
        loss: in :data:`vmamba.medical.recipe_losses.LOSSES`. sigmoid: one output for two classes.
        resize: how slices come to ``size``, in :data:`vmamba.medical.resize.RESIZERS`.
        half_period: epochs in which the cosine goes down; then it goes up again. None: once, step by step.
        best: what chooses best.ckpt, in :data:`BEST`.
        frozen: epochs without the encoder. patience: epochs of no lower training loss after which it ends.
    """

    words: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    loss: str = "CE + Dice"
    sigmoid: bool = False
    resize: str = "zoom"
    half_period: int | None = None
    best: str = "val_dice"
    frozen: int = 0
    patience: int | None = None

    def options(self, model: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """The network's options: the published ones, which go with the published network alone, and those ``given``."""
        return {**(self.network if model in (None, self.settings.get("model")) else {}), **given}


_VMUNET = {"lr": 1e-3, "min_lr": 1e-5, "weight_decay": 1e-2, "batch_size": 32, "epochs": 300, "seed": 42}
_ISIC = {**_VMUNET, "size": [256, 256], "normalisation": "range255", "augmentation": "vmunet-isic"}
_MSVM = {**_VMUNET, "model": "msvm_unet_tiny", "lr": 5e-4, "min_lr": 1e-6, "size": [224, 224]}
_MSVM |= {"normalisation": "centred", "augmentation": "msvm", "val_fraction": 0.0}
_SYNAPSE = {"size": [224, 224], "normalisation": "none", "augmentation": "transunet", "val_fraction": 0.0}
_ONE = {"loss": "BCE + Dice", "sigmoid": True, "resize": "bilinear", "half_period": 50, "best": "val_loss"}
_MIX: dict[str, Any] = {"loss": "0.4 CE + 0.6 Dice", "frozen": 10, "patience": 15, "network": {"in_chans": 3}}

RECIPES = {
    "plain": Recipe("for any data; the loss is VM-UNet's of Synapse, the cosine goes down once"),
    "vmunet-isic": Recipe("VM-UNet, ISIC 2017 and 2018 (arXiv:2402.02491)", {**_ISIC, "model": "vmunet"}, **_ONE),
    "mhs-isic": Recipe("MHS-UNet, ISIC 2017 and 2018 (arXiv:2406.05992)", {**_ISIC, "model": "mhs_unet_4h"}, **_ONE),
    "vmunet-synapse": Recipe(
        "VM-UNet, Synapse (arXiv:2402.02491)",
        {**_VMUNET, **_SYNAPSE, "model": "vmunet"},
        network={"in_chans": 3},
        half_period=100,
        best="train_loss",
    ),
    "msvm-synapse": Recipe(
        "MSVM-UNet, Synapse (arXiv:2408.13735)", {**_MSVM, "weight_decay": 1e-3}, best="train_loss", **_MIX
    ),
    "msvm-acdc": Recipe("MSVM-UNet, ACDC (arXiv:2408.13735)", {**_MSVM, "weight_decay": 1e-4}, **_MIX),
}


def recipe(name: str) -> Recipe:
    """A recipe by its name; UserError lists those that exist."""
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: unknown; choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def settings_for(given: Mapping[str, Any]) -> Settings:
    """The settings of a new training: those given, else the recipe's; without one, that of the data's layout."""
    layout = find_layout(Path(given["data"])) if given.get("data") else None
    name = given.get("recipe") or (layout.recipe if layout else "plain")
    chosen = recipe(name)
    network = chosen.options(given.get("model"), given.get("network", {}))
    return Settings(**{**chosen.settings, **given, "recipe": name, "network": network})

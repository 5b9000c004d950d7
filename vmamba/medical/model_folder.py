"""nnU-Net's results tree: TRAINER__PLANS__CONFIG/fold_X with checkpoints that hold all that prediction needs."""

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmamba.checkpoint import load_checkpoint
from vmamba.errors import UserError
from vmamba.inert import NUMPY
from vmamba.medical.fold_module import FoldSettings
from vmamba.medical.labelset import LabelSet, label_set
from vmamba.medical.networks import OLDER, build, raise_patch
from vmamba.medical.plan import Configuration, configuration
from vmamba.medical.raw import read_dataset_json
from vmamba.safety import replacing


def folder_name(trainer: str, plans: str, config: str) -> str:
    """nnU-Net's name of a trained configuration's folder."""
    return f"{trainer}__{plans}__{config}"


@dataclass(frozen=True)
class ModelFolder:
    """A trained configuration: plans.json, dataset.json and the folds beside them."""

    folder: Path
    plans: dict[str, Any]
    dataset: dict[str, Any]
    labels: LabelSet
    configuration: Configuration

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.dataset.get("channel_names", self.dataset.get("modality", ())))

    @property
    def ending(self) -> str:
        """Of the files."""
        return self.dataset["file_ending"]

    def folds(self) -> list[str]:
        """Folds that have a checkpoint, in order."""
        found = [p.parent.name.removeprefix("fold_") for p in sorted(self.folder.glob("fold_*/checkpoint_*.pth"))]
        return list(dict.fromkeys(found))

    def checkpoint(self, fold: str, name: str) -> Path:
        """The checkpoint file of a fold; UserError lists what is there."""
        path = self.folder / f"fold_{fold}" / name
        if not path.is_file():
            there = ", ".join(self.folds()) or "none"
            raise UserError(f"{path}: no such checkpoint; folds with one in {self.folder.name}: {there}")
        return path


def open_model(folder: Path) -> ModelFolder:
    """The model folder; UserError if it is none."""
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} in it; expected a folder TRAINER__PLANS__CONFIG of nnUNet_results")
    plans, dataset = (read_dataset_json(folder / name) for name in ("plans.json", "dataset.json"))
    config = folder.resolve().name.split("__")[-1]
    labels = label_set(dataset, str(folder / "dataset.json"))
    return ModelFolder(folder, plans, dataset, labels, configuration(plans, config, str(folder / "plans.json")))


def save_model(path: Path, network: nn.Module, state: dict[str, Any]) -> None:
    """A checkpoint in nnU-Net's form, plain data only, whole or not at all.

    ``state``: trainer_name, init_args, settings, patch, current_epoch, inference_allowed_mirroring_axes.
    """
    weights = {k: v.detach().cpu() for k, v in network.state_dict().items()}
    with replacing(path) as partial:
        torch.save({"network_weights": weights, **state}, partial)


@dataclass
class Trained:
    """A network with its weights, the size of its windows, the axes that it was mirrored along, and its file."""

    network: nn.Module
    patch: tuple[int, ...]
    mirrored: tuple[int, ...]
    source: Path = Path()

    @property
    def name(self) -> str:
        """``fold_0/checkpoint_final.pth``"""
        return "/".join(self.source.parts[-2:])


def load_model(model: ModelFolder, path: Path, *, trust: bool = False) -> Trained:
    """The network of a checkpoint of this program or of a published trainer; runs no pickled code unless ``trust``."""
    try:
        with torch.serialization.safe_globals([*NUMPY]):
            stored = torch.load(path, map_location="cpu", weights_only=not trust)
        trainer, weights = stored["trainer_name"], stored["network_weights"]
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than plain data, or is damaged; if you trust its origin, load it with --trust"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: cannot be read as a checkpoint of nnU-Net's form ({reason})") from error
    settings = FoldSettings(**stored.get("settings", {"trainer": trainer}))
    network = _fill(model, weights, path, [settings.trainer, *filter(None, [OLDER.get(trainer)])], settings.network)
    patch = tuple(stored.get("patch") or raise_patch(network, model.configuration.patch))
    mirrored = stored.get("inference_allowed_mirroring_axes")
    return Trained(network.eval(), patch, tuple(mirrored or ()), path)


def _fill(
    model: ModelFolder, weights: dict[str, Any], path: Path, trainers: Sequence[str], options: dict[str, Any]
) -> nn.Module:
    """The first network of ``trainers`` that the weights fit; UserError says why they do not fit the first of all."""
    reasons = []
    for trainer in trainers:
        network = build(trainer, model.configuration, model.channels, model.labels.outputs, options)
        try:
            load_checkpoint(network, weights)
        except ValueError as error:
            reasons.append(" ".join(str(error).split())[:160])
        else:
            return network
    raise UserError(f"{path}: its weights do not fit {trainers[0]} of this version ({reasons[0]})")


def write_plain(path: Path, data: Any) -> None:
    """JSON with the keys in their order (that of regions matters), whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(data, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")

"""The run folder: what lies in it, when it may be written, and how its checkpoints are read."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from vmamba.errors import UserError
from vmamba.medical.recipes import recipe
from vmamba.medical.spec import FORMAT, Settings, Spec
from vmamba.safety import LOCK, replacing

FILES = ("config.json", "metrics.csv", "curves.png", "best.ckpt", "last.ckpt", "summary.json")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes ``data`` whole or not at all; NaN becomes null."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(_nulls(data), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file."""
    return json.loads(path.read_text())


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _nulls(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nulls(v) for v in value]
    return None if isinstance(value, float) and value != value else value


def check_run(run: Path, overwrite: bool) -> None:
    """UserError if something lies in ``run`` that may not be replaced; touches nothing."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; expected a folder for the run")
    if run.is_dir() and any(path.name != LOCK for path in run.iterdir()):
        if not overwrite:
            choices = "give another folder, --resume to continue or --overwrite to replace"
            raise UserError(f"{run}: exists and is not empty; {choices}")
        if not (run / "config.json").exists():
            raise UserError(f"{run}: is not a run (no config.json), so it is left alone; give another folder")


def clear_run(run: Path) -> None:
    """Makes the folder of a new run, without the files of an earlier one."""
    for name in FILES:
        (run / name).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)


def resumed(run: Path, given: dict[str, Any]) -> Settings:
    """The stored settings of a run to continue; UserError if there is none or an option given now differs."""
    stored = read_config(run)
    if not (run / "last.ckpt").exists():
        raise UserError(
            f"{run}: no last.ckpt to resume from, it stopped in its first epoch; start again with --overwrite"
        )
    if "network" in given:
        given = {**given, "network": recipe(stored.recipe).options(stored.model, given["network"])}
    was = stored.as_dict()
    differing = [f"{name}={was[name]} (now {value})" for name, value in given.items() if value != was[name]]
    if differing:
        raise UserError(f"{run}: was started with {', '.join(differing)}; resume without these options")
    return stored


def read_config(run: Path) -> Settings:
    """The settings in RUN/config.json; UserError if there are none."""
    path = run / "config.json"
    if not path.exists():
        raise UserError(f"{run}: no config.json in it; expected the folder of a run of vmamba medseg train")
    try:
        return Settings.from_dict(json.loads(path.read_text())["settings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a configuration of this version ({error})") from error


def load_checkpoint(source: Path) -> tuple[Spec, dict[str, torch.Tensor]]:
    """(spec, state of the network) from RUN (its best.ckpt, else last.ckpt) or a .ckpt file; runs no pickled code."""
    path = source
    if source.is_dir():
        path = next((source / n for n in ("best.ckpt", "last.ckpt") if (source / n).exists()), source / "best.ckpt")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; expected a run folder or a .ckpt of vmamba medseg train")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        spec = stored["hyper_parameters"]["spec"]
        if spec["format"] != FORMAT:
            raise UserError(f"{path}: format {spec['format']!r}; this version reads {FORMAT!r}")
        head = "network."
        return Spec(**spec), {k[len(head) :]: v for k, v in stored["state_dict"].items() if k.startswith(head)}
    except UserError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: a checkpoint, but not one of vmamba medseg train (no {error})") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason}); is the file complete?") from error

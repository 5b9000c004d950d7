"""Checkpoints with objects beside the tensors: what is known becomes an empty mapping, the rest is refused."""

import argparse
import pathlib
import sys
import types

import numpy as np
import pytest
import torch

import vmamba
from tests.timm_zoo import small
from vmamba.checkpoint import read

NAME = "vmamba_tiny_s1l8"


@pytest.fixture
def classes(monkeypatch):
    """Classes under the names of yacs and mmengine, which need not be installed; what ``vmamba.mm`` allows is off."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()

    def make(module, name, *bases):
        parts = module.split(".")
        for name_so_far in (".".join(parts[: i + 1]) for i in range(len(parts))):
            monkeypatch.setitem(sys.modules, name_so_far, sys.modules.get(name_so_far) or types.ModuleType(name_so_far))
        holder = sys.modules[module]
        made = type(name, bases, {"__module__": module})
        monkeypatch.setattr(holder, name, made, raising=False)
        return made

    yield make("yacs.config", "CfgNode", dict), make("mmengine.logging.history_buffer", "HistoryBuffer")
    torch.serialization.add_safe_globals(allowed)


def test_training_files_are_read(tmp_path, classes):
    config, history = classes
    logs = history()
    logs.numbers = np.arange(3.0)
    beside = {
        "args": argparse.Namespace(lr=1e-3, output=pathlib.Path("out")),
        "config": config(MODEL=config(TYPE="vssm")),
        "message_hub": {"loss": logs, "last": np.float64(0.5)},
    }
    model = small(NAME)
    torch.save({"model": model.state_dict(), **beside}, tmp_path / "training.pth")
    content = read(tmp_path / "training.pth")
    assert not content["args"] and type(content["message_hub"]["loss"]) is type(content["args"])
    assert content["message_hub"]["last"] == 0.5
    assert vmamba.load_checkpoint(small(NAME), tmp_path / "training.pth").ok
    with pytest.raises(Exception, match="Unsupported global"):
        torch.load(tmp_path / "training.pth", weights_only=True)


class Unknown:
    """No class that checkpoints are known to hold."""


def test_other_objects_are_refused(tmp_path):
    torch.save({"model": small(NAME).state_dict(), "extra": Unknown()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"objects that could run code and are not loaded \(.*test_inert\.Unknown\)"):
        read(tmp_path / "file.pth")

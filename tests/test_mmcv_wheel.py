"""mmcv's wheel: built once, kept by what it depends on, and failures that say why; pip is a stand-in here."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from vmamba.errors import UserError
from vmamba.tools import mmcv_wheel
from vmamba.tools.mmcv_wheel import folder, pinned, wheel

FAKE_PIP = """\
import os, sys
from pathlib import Path
words = sys.argv[1:]
assert words[0] == "wheel" and "--no-cache-dir" in words and os.environ["MMCV_WITH_OPS"] == "1"
version = words[-1].split("==")[1]
if version == "0.0":
    print("error: no such thing")
    sys.exit(1)
Path(words[words.index("--wheel-dir") + 1], f"onedl_mmcv-{version}.whl").write_text(os.environ["MAX_JOBS"])
"""


@pytest.fixture
def constraints(tmp_path, monkeypatch):
    """A constraints file; pip is a stand-in, and the cache a folder of the test."""
    (tmp_path / "pip.py").write_text(FAKE_PIP)
    monkeypatch.setattr(mmcv_wheel, "PIP", (sys.executable, str(tmp_path / "pip.py")))
    monkeypatch.setenv("VMAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    path = tmp_path / "constraints.txt"
    path.write_text("numpy==2.2.6\nonedl-mmcv==2.3.6 ; python_version > '3'\n")
    return path


def test_built_once(constraints, monkeypatch, capsys):
    first = wheel(constraints)
    assert first.read_text().isdigit() and [path.name for path in first.parent.iterdir()] == ["onedl_mmcv-2.3.6.whl"]
    assert "about 12 minutes" in capsys.readouterr().err
    monkeypatch.setattr(mmcv_wheel, "PIP", ("no-pip-is-needed",))
    assert wheel(constraints) == first and not capsys.readouterr().err


def test_key(constraints, monkeypatch):
    place = folder(pinned(constraints))
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert place.name.startswith(f"2.3.6-{python}-torch{torch.__version__}-") and place.parent.name == "mmcv"
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert folder("2.3.6") != place and folder("2.3.7") != folder("2.3.6")
    monkeypatch.delenv("VMAMBA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert folder("2.3.6").is_relative_to(Path("/elsewhere/vmamba/mmcv"))


def test_failures(constraints, monkeypatch):
    with pytest.raises(UserError, match="does not pin onedl-mmcv"):
        pinned(Path(__file__))
    constraints.write_text("onedl-mmcv==0.0\n")
    with pytest.raises(UserError, match=r"cannot be built; the end of the output of .*\nerror: no such thing"):
        wheel(constraints)
    assert not folder("0.0").exists()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"need a C\+\+ compiler"):
        wheel(constraints)


def test_our_constraints_pin_it():
    assert pinned(Path(__file__).parents[1] / "constraints.txt")[0].isdigit()

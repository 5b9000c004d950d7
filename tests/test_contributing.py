"""The worked example of CONTRIBUTING.md: its files, put where it says, are found, registered and tested."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"^`(\S+\.py)`:\n\n```python\n(.*?)```", TEXT, re.M | re.S))
LINKED = ("heads", "kernels", "scans", "tools")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout with the example's files in it."""
    copy = tmp_path_factory.mktemp("contributing")
    for folder in ("vmamba", "tests", *LINKED):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, code in FILES.items():
        assert not (copy / name).exists(), f"{name} is there already"
        (copy / name).write_text(code)
    return copy


def python(tree, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(tree), "VMAMBA_BACKEND": "reference"}  # compiles nothing
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_there_is_one_file_of_each_kind():
    assert [Path(name).parent.as_posix() for name in FILES] == ["scans", "vmamba/models"]


def test_programme(tree):
    (code,) = re.findall(r"^```python\n(import timm.*?)```", TEXT, re.M | re.S)
    code += "\nassert logits.shape == (2, 10) and all(p.grad is not None for p in model.parameters())\n"
    code += (
        "assert torch.equal(model.state_dict()['stem.conv1.bias'], official['embed.proj.bias'])\nprint(vmamba.__file__)"
    )
    assert python(tree, "-c", code).strip() == str(tree / "vmamba/__init__.py")


def test_the_tests_find_them(tree):
    """The scan passes the tests of every scan, the network those of timm's protocol that take little time."""
    files = ("tests/test_scans.py", "tests/test_timm_registry.py", "tests/test_timm_forward.py")
    chosen = "(TestEveryScan and outwards) or (ripple_tiny and not float32)"
    printed = python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert int(re.search(r"(\d+) passed", printed)[1]) >= 30 and "failed" not in printed


def test_style(tree):
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *arguments, *FILES], cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

"""The layout of the checkout, and what a wheel, an sdist, an editable install and a bare checkout give to a user."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("heads", "kernels", "scans", "tools")
EXTRAS = (
    "cv2",
    "lightning",
    "matplotlib",
    "monai",
    "nibabel",
    "nilearn",
    "pandas",
    "pytorch_lightning",
)
EXTRAS += ("segmentation_models_pytorch", "sklearn", "skimage", "mmcv", "mmengine")
SITE = sysconfig.get_path("purelib")


def python(*arguments: str, cwd: Path = ROOT) -> str:
    """What Python prints, run without this environment's .pth files, so that an installed vmamba does not count."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VMAMBA"))}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def bare(code: str, cwd: Path = ROOT) -> str:
    """What ``code`` prints where the dependencies are installed and vmamba is not."""
    return python("-S", "-c", f"import sys; sys.path.append({SITE!r})\n{code}", cwd=cwd)


def build(hook: str, tree: Path, folder: Path) -> Path:
    """The distribution that a build hook of setuptools makes of ``tree``."""
    folder.mkdir(exist_ok=True)
    python("-c", f"from setuptools.build_meta import {hook}; {hook}({str(folder)!r})", cwd=tree)
    (made,) = folder.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sources(root: Path) -> dict[str, Path]:
    """The package's files by their path in a wheel."""
    folders = {"vmamba": root / "vmamba"} | {f"vmamba/{name}": root / name for name in LINKED}
    found = {}
    for prefix, folder in folders.items():
        files = [
            path
            for path in (*folder.rglob("*.py"), *folder.rglob("*.cu"))
            if not any(p.is_symlink() for p in path.parents if root in p.parents)
        ]
        found |= {f"{prefix}/{path.relative_to(folder).as_posix()}": path for path in files}
    return found | {"vmamba/py.typed": root / "vmamba/py.typed"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout to build from, so that nothing is written into this one."""
    copy = tmp_path_factory.mktemp("tree") / "vmamba"
    unwanted = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "demo", "runs")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return contents(build("build_wheel", tree, tmp_path_factory.mktemp("wheel")))


def test_packages_are_the_folders_with_code():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in sources(ROOT)}
    assert sorted(listed) == sorted(folders)
    mapped = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().splitlines())
    assert mapped == {"vmamba": "vmamba"} | {f"vmamba.{name}": name for name in LINKED}


def test_contributing_tells_what_each_file_is_for():
    table = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| `")]
    told = [name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(told) == sorted(file.stem for file in (ROOT / "vmamba").glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize("name", LINKED)
def test_links(name):
    link = ROOT / "vmamba" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (link / next((ROOT / name).glob("*.py")).name).is_file()


def test_kernels_does_not_hide_the_package_of_that_name():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_wheel_holds_the_package_and_nothing_else(tree, wheel):
    files = sources(tree)
    metadata = {name for name in wheel if ".dist-info/" in name}
    assert set(wheel) - metadata == set(files)
    assert {name: wheel[name] for name in files} == {name: path.read_bytes() for name, path in files.items()}
    assert {name.split("/")[0] for name in wheel} == {"vmamba", next(iter(metadata)).split("/")[0]}
    text = {name.split("/", 1)[1]: wheel[name].decode() for name in metadata}
    assert "vmamba = vmamba.tools.cli:main" in text["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in text["METADATA"]
    assert "Apache License" in text["licenses/LICENSE"]


def test_sdist_gives_the_same_wheel(tree, wheel, tmp_path):
    with tarfile.open(build("build_sdist", tree, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.glob("vmamba-*")
    assert {"Makefile", "constraints.txt", "tests/test_layout.py"} <= {
        path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")
    }
    again = contents(build("build_wheel", unpacked, tmp_path / "wheel"))
    assert again == wheel


def test_editable_install(tree, tmp_path):
    made = build("build_editable", tree, tmp_path / "editable")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "site")
    site = str(tmp_path / "site")
    code = f"import site; sys.path.insert(0, {site!r}); site.addsitedir({site!r})\n"
    code += "import vmamba.kernels.routes as k, vmamba.scans as s, vmamba.tools.cli as t\n"
    code += "print(k.__file__, s.__file__, t.__file__, sep='\\n')"
    paths = [Path(line).resolve() for line in bare(code, cwd=tmp_path).splitlines()]
    assert paths == [(tree / name).resolve() for name in ("kernels/routes.py", "scans/__init__.py", "tools/cli.py")]


def test_uninstalled_checkout():
    code = "import vmamba.kernels.routes, vmamba.heads, vmamba.tools.cli, pytest\nprint(vmamba.__file__)\n"
    code += "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests/test_scans.py']))"
    lines = bare(code).splitlines()
    assert Path(lines[0]).resolve() == ROOT / "vmamba/__init__.py"
    assert any(line.startswith("tests/test_scans.py::") for line in lines)


def test_import_is_quick_quiet_and_needs_no_extra():
    code = f"sys.modules.update(dict.fromkeys({EXTRAS!r}))  # importing them fails\n"
    code += "import time, torch, timm\nstart = time.process_time()\nimport vmamba\n"
    code += "print(time.process_time() - start, 'numba' in sys.modules, len(vmamba.list_models()))"
    printed = [bare(code).split() for _ in range(3)]
    assert all(len(words) == 3 for words in printed), "importing vmamba prints something"
    assert {words[1] for words in printed} == {"False"}, "importing vmamba compiles nothing, so it needs no numba"
    assert int(printed[0][2]) > 0
    assert min(float(words[0]) for words in printed) < 0.3


def test_commands_without_extras():
    code = f"sys.modules.update(dict.fromkeys({EXTRAS!r}))\nfrom vmamba.tools.cli import main\n"
    code += "codes = [main(['list', 'vmunet']), main(['doctor']), main(['medseg', 'train', '-o', 'never-written'])]\n"
    code += "print(codes)"
    printed = bare(code)
    assert "[0, 0, 2]" in printed
    (error,) = [line for line in printed.splitlines() if line.startswith("vmamba: error:")]
    assert "pip install" in error and "vmamba[medical]" in error

"""mmcv with its operators as a wheel, built once for this Python, PyTorch and device, and kept in the user's cache.

mmcv comes as source: its operators must be compiled against the PyTorch that they are used with, which takes about
12 minutes on two cores. ``make mm`` runs this (``python -m vmamba.tools.mmcv_wheel``), which prints the wheel's folder:
``VMAMBA_CACHE``, by default ``~/.cache/vmamba``, then ``mmcv/VERSION-PYTHON-TORCH-DEVICE-MACHINE``.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vmamba.errors import UserError
from vmamba.machine import cpus

PACKAGE = "onedl-mmcv"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
TAIL = 30  # lines of a failed build that are shown


def pinned(constraints: Path) -> str:
    """The version of mmcv in a constraints file.

    Raises:
        UserError: there is none.
    """
    found = re.search(rf"^{PACKAGE}==(\S+)", constraints.read_text(), re.MULTILINE)
    if not found:
        raise UserError(f"{constraints} does not pin {PACKAGE}")
    return found[1]


def device() -> str:
    """For what operators can be compiled here: "cuda" with a GPU and a compiler for it, else "cpu"."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    return "cuda" if torch.cuda.is_available() and CUDA_HOME else "cpu"


def folder(mmcv: str) -> Path:
    """Where the wheel of a version of mmcv for this Python, PyTorch, device and machine is kept."""
    import torch

    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vmamba")
    parts = mmcv, f"cp{sys.version_info.major}{sys.version_info.minor}", f"torch{torch.__version__}", device()
    return Path(os.environ.get("VMAMBA_CACHE") or default, "mmcv", "-".join([*parts, platform.machine()]))


def wheel(constraints: Path) -> Path:
    """The wheel, from the cache or built now.

    Raises:
        UserError: there is no C++ compiler, or the build fails; the message has the end of its output.
    """
    version = pinned(constraints)
    place = folder(version)
    kept = sorted(place.glob("*.whl"))
    if kept:
        return kept[0]
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        raise UserError("mmcv's operators need a C++ compiler; install one (on Debian and Ubuntu: apt install g++)")
    print(f"building mmcv's operators for {place.name}: about 12 minutes on two cores, once", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        built = _build(version, constraints, Path(scratch))
        place.mkdir(parents=True, exist_ok=True)
        partial = place / f"{built.name}.partial"
        shutil.copyfile(built, partial)  # the cache may be on another disk
        return partial.replace(place / built.name)


def _build(version: str, constraints: Path, scratch: Path) -> Path:
    """Compile in ``scratch``, with a sign of life each minute."""
    environment = {**os.environ, "MMCV_WITH_OPS": "1", "MAX_JOBS": os.environ.get("MAX_JOBS") or str(_jobs())}
    if device() == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # a GPU without its compiler must not be found
    command: Sequence[str] = (
        *PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-binary", PACKAGE,
        "--constraint", str(constraints), "--wheel-dir", str(scratch), f"{PACKAGE}=={version}",
    )  # fmt: skip
    log, start = scratch / "build.log", time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while True:
            try:
                code = process.wait(60)
                break
            except subprocess.TimeoutExpired:
                print(f"  {time.monotonic() - start:.0f} s", file=sys.stderr)
    built = sorted(scratch.glob("*.whl"))
    if code or not built:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
        raise UserError(f"mmcv's operators cannot be built; the end of the output of {' '.join(command)}:\n{end}")
    return built[0]


def _jobs() -> int:
    """Compilers that run at once: one for each core, as far as 2 GiB of memory for each go."""
    cores = cpus()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return cores
    return max(1, min(cores, memory // 2**31))


def main() -> int:
    """Print the folder of the wheel for the constraints file of this checkout."""
    try:
        print(wheel(Path(__file__).resolve().parents[1] / "constraints.txt").parent)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

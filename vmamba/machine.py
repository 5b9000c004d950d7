"""On what a figure was measured: the device, and the versions of what runs on it."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("vmamba", "torch", "triton", "timm", "mamba-ssm", "causal-conv1d", "flash-linear-attention")


def machine(device: torch.device) -> dict[str, str]:
    """``device`` in words, ``versions`` of what is installed and what is ``missing`` of what could be compared."""
    found = {name: installed(name) for name in PACKAGES}
    there = {"Python": platform.python_version(), **{name: text for name, text in found.items() if text}}
    if device.type == "cuda":
        there |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version()), "driver": _driver()}
    return {
        "device": _gpu(device) if device.type == "cuda" else _cpu(),
        "versions": ", ".join(f"{name} {text}" for name, text in there.items()),
        "missing": ", ".join(name for name, text in found.items() if not text) or "nothing",
    }


def _gpu(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device)
    size = f"{found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors"
    return f"{found.name}, {size}, capability {found.major}.{found.minor}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {threads}"


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def installed(package: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

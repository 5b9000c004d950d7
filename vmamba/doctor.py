"""What is installed here, which devices there are, and which backend each operator takes on them, and why."""

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vmamba.kernels.backends import ORDER, available, operators, why_not
from vmamba.machine import installed
from vmamba.openmmlab import BUILD, REGISTRY, SUPPORTED, Toolbox, toolboxes

PACKAGES = {
    "core": ("vmamba", "torch", "torchvision", "timm", "triton", "numba", "numpy", "PyWavelets", "safetensors", "tqdm"),
    "medical": ("monai", "nibabel", "lightning", "nilearn", "matplotlib", "filelock", "h5py", "scikit-learn"),
}
SETTINGS = ("VMAMBA_BACKEND", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Choice:
    """What ``operator`` runs on for tensors of ``device``: the backend taken, and per other backend why it is not."""

    operator: str
    device: str
    backend: str
    others: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """What :func:`doctor` found; ``str(report)`` is the text that ``vmamba doctor`` prints."""

    python: str
    packages: Mapping[str, Mapping[str, str | None]]
    devices: tuple[str, ...]
    settings: Mapping[str, str]
    choices: tuple[Choice, ...]
    openmmlab: Mapping[str, Toolbox]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"python {self.python}"
        for extra, packages in self.packages.items():
            yield f"{extra}: " + ", ".join(f"{name} {found or 'MISSING'}" for name, found in packages.items())
            if extra != "core" and None in packages.values():
                yield f"  for what is missing: pip install 'vmamba[{extra}]'"
        yield from self._openmmlab()
        yield "devices: " + "; ".join(self.devices)
        yield from (f"{name}={value} is set" for name, value in self.settings.items())
        for operator in dict.fromkeys(choice.operator for choice in self.choices):
            yield operator
            for choice in (c for c in self.choices if c.operator == operator):
                yield f"  {choice.device} tensors: {choice.backend}"
                yield from (f"    not {name}: {reason}" for name, reason in choice.others.items())

    def _openmmlab(self) -> Iterator[str]:
        yield "openmmlab: " + ", ".join(str(self.openmmlab.get(name, f"{name} MISSING")) for name in SUPPORTED)
        for name, toolbox in self.openmmlab.items():
            yield from (f"  {name}: {problem}" for problem in toolbox.problems)
        yield f"  {REGISTRY}" if "mmengine" in self.openmmlab else f"  {BUILD}"


def doctor() -> Report:
    """Looks at this machine; compiles and runs nothing, but imports what there is of OpenMMLab.

    >>> doctor().choices[0].operator
    'add_norm'
    """
    packages = {extra: {name: installed(name) for name in names} for extra, names in PACKAGES.items()}
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    samples = _sample("cpu"), _sample("cuda")
    choices = tuple(_choice(operator, sample) for operator in operators() for sample in samples)
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Report(system, packages, tuple(_devices()), settings, choices, toolboxes())


def _choice(operator: str, sample: Tensor) -> Choice:
    reasons = {name: why_not(operator, name, sample) for name in ORDER}
    asked = os.environ.get("VMAMBA_BACKEND", "")
    if asked and asked not in ORDER:
        reasons[asked] = f"VMAMBA_BACKEND asks for it, but there are only {', '.join(ORDER)}"
    elif asked not in available(operator):
        asked = ""  # an operator without it chooses by itself
    able = [name for name, reason in reasons.items() if reason is None and asked in ("", name)]
    taken = able[0] if able else "none"
    rest = f"it could, but {f'VMAMBA_BACKEND asks for {asked}' if asked else f'{taken} is preferred'}"
    others = {name: reason or rest for name, reason in reasons.items() if name != taken}
    return Choice(operator, sample.device.type, taken, others)


def _sample(device: str) -> Tensor:
    """A float32 tensor of ``device``; a fake one where there is no such device, so that the choice can be told."""
    if device == "cpu" or torch.cuda.is_available():
        return torch.empty(1, device=device)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(1, device=device)


def _devices() -> Iterator[str]:
    yield f"cpu, {os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = f"{found.total_memory / 2**30:.0f} GiB, capability {found.major}.{found.minor}"
        yield f"cuda:{index}, {found.name}, {size}"
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}, but finds no GPU" if torch.version.cuda else "has no CUDA"
        yield f"no cuda device (PyTorch {built}); what is said of cuda tensors below holds once there is one"

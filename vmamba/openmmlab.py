"""What of OpenMMLab is installed, and whether it works together: the usual failures in plain words."""

import importlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version

import torch

SUPPORTED = {  # import name -> versions that work, from the first to before the second
    "mmengine": ("0.10", "1.0"),
    "mmcv": ("2.0", "3.0"),
    "mmdet": ("3.0", "4.0"),
    "mmseg": ("1.0", "2.0"),
    "mmpretrain": ("1.0", "2.0"),
}
PARTS = {"mmcv": "mmcv._ext"}  # what is imported to see whether a toolbox works, if not the toolbox itself
BUILD = "in a checkout of vmamba, make mm builds mmcv's operators for the PyTorch that is here and installs the rest"
WORDS = {  # what an import error says -> what it means, and what would do
    r"No module named 'mmcv\._ext'": f"it has no operators (mmcv-lite, or built without MMCV_WITH_OPS=1); {BUILD}",
    r"undefined symbol|libc10|libtorch|libcudart|_ext.*DLL": (
        f"its operators were built for another PyTorch than {torch.__version__}; {BUILD}"
    ),
    r"lib(GL|EGL|gthread|SM|X\w+)[\w.-]*\.so": (
        "OpenCV looks for libraries of a desktop; where there is none: "
        "pip install --force-reinstall --no-deps opencv-python-headless"
    ),
    r"\w+==\S+ is used but incompatible": "the versions do not fit each other; install the one that it asks for",
    r"pkg_resources": "setuptools has lost pkg_resources, which it uses; pip install 'setuptools<81'",
    r"_ARRAY_API|numpy\.(core|dtype)|NumPy 1\.x": "a part of it was built for another NumPy; install that part again",
    r"No module named 'mm(engine|cv|det|seg)'": f"OpenMMLab is not installed; pip install 'vmamba[mm]', or {BUILD}",
    r"No module named": "a package that it uses is not installed; install it",
}
REGISTRY = (
    "a KeyError '... is not in the ... registry' for VMambaBackbone means that the configuration lacks "
    'custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)'
)


@dataclass(frozen=True)
class Toolbox:
    """A package of OpenMMLab: its version, the distributions that provide it, and what is wrong with it."""

    name: str
    version: str
    distributions: tuple[str, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.version}" + ("" if self.distributions == (self.name,) else self._from())

    def _from(self) -> str:
        return f" (from {', '.join(self.distributions)})"


def toolboxes() -> dict[str, Toolbox]:
    """The toolboxes that are installed, by import name; imports each of them, to see whether that works."""
    providers = packages_distributions()
    return {name: _examine(name, tuple(sorted(set(providers[name])))) for name in SUPPORTED if name in providers}


def _examine(name: str, distributions: tuple[str, ...]) -> Toolbox:
    found = version(distributions[0])
    problems = [_clash(name, distributions), _out_of_range(name, found), _broken(PARTS.get(name, name))]
    return Toolbox(name, found, distributions, tuple(problem for problem in problems if problem))


def _clash(name: str, distributions: tuple[str, ...]) -> str | None:
    if len(distributions) < 2:
        return None
    both = " and ".join(distributions)
    return f"{both} both put {name} into the same folder: pip uninstall {' '.join(distributions)}, and install one"


def _out_of_range(name: str, found: str) -> str | None:
    first, before = SUPPORTED[name]
    fits = _numbers(first) <= _numbers(found) < _numbers(before)
    return None if fits else f"{name} must be {first} or newer and older than {before}, but {found} is installed"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.split("+")[0])[:2])


def _broken(module: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises
        return explain(error)
    return None


def explain(error: Exception) -> str:
    """An error at an import in plain words: what it means and what would do, then the error itself.

    >>> explain(ImportError("libGL.so.1: cannot open shared object file")).split(";")[0]
    'OpenCV looks for libraries of a desktop'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    meaning = next((words for pattern, words in WORDS.items() if re.search(pattern, text)), "it cannot be imported")
    return f"{meaning} (it says: {text[:300]})"


def advice_on(config: Mapping) -> str | None:
    """What a configuration of mmengine lacks for our networks to be found; None if nothing."""
    imports = (config.get("custom_imports") or {}).get("imports") or []
    return None if "vmamba.mm" in ([imports] if isinstance(imports, str) else imports) else REGISTRY

"""A trained detector or segmentor from a configuration and a checkpoint, and what it says of a picture."""

import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from vmamba.checkpoint import COUNTERS, ENVELOPES, WRAPPERS
from vmamba.device import choose_device
from vmamba.errors import UserError
from vmamba.mm import operators
from vmamba.mm.palette import Classes
from vmamba.mm.weights import read

UNUSED = "auxiliary_head."  # trains a segmentor and takes no part in its predictions: may be missing or left over
SHOWN = 8


@dataclass(frozen=True)
class Kind:
    """What a command works with: ``what`` it is, its toolbox ``scope``, its base class, the other kind's command."""

    what: str
    scope: str
    base: str
    command: str


KINDS = {
    "mmdet": Kind("detector", "mmdet", "BaseDetector", "detect"),
    "mmseg": Kind("segmentor", "mmseg", "BaseSegmentor", "segment"),
}


class Network:
    """A network in eval mode on its device, with its classes and the transforms of its test pictures.

    ``settings`` has digests of the configuration's network and of the weights: what predictions depend on.

    Args:
        cfg: a configuration of mmengine.
        checkpoint: path or address of a file that ``vmamba train`` or the original code wrote. No code in it runs.
        scope: "mmdet" for a detector, "mmseg" for a segmentor.
        device: "auto" (the GPU if there is one), "cpu", "cuda:1" ...

    Raises:
        UserError: the configuration is for the other kind or cannot be built, the checkpoint cannot be read or is of
            another network (its names are listed), or the device does not work.
    """

    def __init__(self, cfg: Any, checkpoint: str, scope: str, device: str = "auto"):
        self.device = choose_device(device)
        self.model = build(cfg, KINDS[scope])
        content = _read(checkpoint)
        weights = load(self.model, content, checkpoint)
        self.model.to(self.device).eval()
        self.classes = Classes.find(content.get("meta"), lambda: _metainfo(cfg), head_classes(self.model))
        steps = _pipeline(cfg)
        self.pipeline = Compose(steps)
        self.settings = {"network": _digest(repr((cfg.model, steps)).encode()), "weights": weights}

    @torch.inference_mode()
    def predict(self, path: Path) -> tuple[np.ndarray, Any]:
        """The picture as its transforms read it, RGB (h, w, 3) uint8, and the data sample with the predictions.

        Raises:
            OSError, ValueError, RuntimeError: the picture cannot be read, or is too small or too large.
        """
        sample: Any = {"img_path": str(path), "img_id": 0}
        image = None
        for transform in self.pipeline.transforms:
            sample = transform(sample)
            if sample is None:
                raise ValueError(f"{type(transform).__name__} of the test data's transforms leaves it out")
            if image is None and "img" in sample:
                image = _rgb(sample["img"])
        if image is None:
            raise ValueError("the transforms of the test data load no picture")
        batch = {"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}
        (result,) = self.model.test_step(batch)  # type: ignore[operator]
        return image, result


def build(cfg: Any, kind: Kind) -> nn.Module:
    """The network of a configuration, with its own initialisation.

    Raises:
        UserError: it is of another kind, or cannot be built.
    """
    name, scope = cfg.filename, cfg.get("default_scope") or kind.scope
    if "model" not in cfg:
        raise UserError(f"{name} has no model: it is no configuration of a network")
    if scope in KINDS and scope != kind.scope:
        raise UserError(f"{name} describes a {KINDS[scope].what} ({scope}); take vmamba {KINDS[scope].command}")
    init_default_scope(scope)
    try:
        with MODELS.switch_scope_and_registry(scope) as registry, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on losses, which are not computed
            model = revert_sync_batchnorm(registry.build(cfg.model))
    except (KeyError, TypeError, ValueError, AssertionError, ImportError) as error:
        raise UserError(f"{name}: the network cannot be built: {one_line(error)}") from error
    if kind.base not in [cls.__name__ for cls in type(model).__mro__]:
        raise UserError(f"{name} describes no {kind.what} but a {type(model).__name__}")
    if scope == "mmdet":
        operators.patch()
        operators.let_ssd_predict()
    return model


def load(model: nn.Module, content: Mapping, source: str) -> str:
    """Load all weights of a checkpoint's ``content``, or none of another network's; returns a digest of them.

    Raises:
        UserError: names are missing, left over or of another shape; they are listed.
    """
    while envelope := next((name for name in ENVELOPES if isinstance(content.get(name), Mapping)), None):
        content = content[envelope]
    state = {WRAPPERS.sub("", str(key)): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    try:
        missing, unexpected = model.load_state_dict(dict(state), strict=False)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{source} is of another network: {one_line(error)}") from error
    wrong = {"missing": missing, "unexpected": unexpected}
    wrong = {title: [name for name in names if not _spared(name)] for title, names in wrong.items()}
    if any(wrong.values()):
        lists = "; ".join(f"{title}: {_listed(names)}" for title, names in wrong.items() if names)
        raise UserError(f"{source} is of another network than this {type(model).__name__}; {lists}")
    return _digest(*(state[key].contiguous().flatten().view(torch.uint8).numpy() for key in sorted(state)))


def _digest(*parts: Any) -> str:
    digest = 0
    for part in parts:
        digest = zlib.crc32(part, digest)
    return f"{digest:08x}"


def head_classes(model: nn.Module) -> int | None:
    """How many classes the head tells apart; None if it does not say."""
    part: Any = getattr(model, "roi_head", model)
    head: Any = next((getattr(part, name) for name in ("decode_head", "bbox_head") if hasattr(part, name)), None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    return getattr(head, "num_classes", None)


def one_line(error: Exception) -> str:
    """An error's message in one line of at most 600 characters."""
    text = " ".join((str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)).split())
    return (text if len(text) <= 600 else f"{text[:600]} ...") or type(error).__name__


def _read(checkpoint: str) -> Mapping:
    try:
        return read(checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(one_line(error)) from error


def _spared(name: str) -> bool:
    return name.startswith(UNUSED) or COUNTERS.search(name) is not None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")


def _datasets(cfg: Any) -> list[Any]:
    """The data set of the test pictures, or of validation, in the order of preference; wrappers are taken off."""
    found = []
    for loader in (cfg.get("test_dataloader"), cfg.get("val_dataloader")):
        dataset = (loader or {}).get("dataset")
        while dataset and "pipeline" not in dataset and ("dataset" in dataset or "datasets" in dataset):
            dataset = dataset.get("dataset") or dataset["datasets"][0]
        found += [dataset] if dataset else []
    return found


def _pipeline(cfg: Any) -> list[Any]:
    """The transforms of the test pictures but for those that read annotations."""
    pipelines = [*(dataset.get("pipeline") for dataset in _datasets(cfg)), cfg.get("test_pipeline")]
    pipeline = next((steps for steps in pipelines if steps), None)
    if pipeline is None:
        raise UserError(
            f"{cfg.filename} has no transforms for test pictures: neither test_dataloader nor test_pipeline"
        )
    return [step for step in pipeline if "Annotation" not in str(step["type"])]


def _metainfo(cfg: Any) -> Mapping:
    """Classes and palette of the configuration's data set, whose files need not be there; nothing if it has none."""
    for dataset in _datasets(cfg)[:1]:
        with suppress(KeyError, TypeError, ValueError, AssertionError, OSError):
            return DATASETS.build({**dataset, "lazy_init": True, "pipeline": []}).metainfo
    return {}


def _rgb(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 of what mmcv reads: BGR, grey or more channels, of any type."""
    image = image if image.ndim == 3 else image[..., None]
    image = image[..., 2::-1] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, -1)
    if image.dtype == np.uint16:
        image = image // 257
    return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))

"""``vmamba info CONFIG.py``: size and cost of the network of a configuration of mmengine."""

import argparse
from collections.abc import Sequence
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.mm_config import configuration

SIZES = {"mmdet": (800, 1280), "mmseg": (512, 2048), "mmengine": (224, 224)}  # for which figures are published, (h, w)


def describe(path: str, input_size: "Sequence[int] | None" = None) -> dict[str, Any]:
    """Facts on the network of the configuration at ``path``, for an image of ``input_size``: [n] or [height, width].

    By default the size is the one for which detectors (1280 x 800), segmentors (2048 x 512) and classifiers (224 x 224)
    are published.

    Raises:
        UserError: the configuration cannot be read, its network cannot be built or counted, or the size is none.
    """
    from vmamba.flops import CONVENTION
    from vmamba.mm.complexity import count

    cfg = configuration(argparse.Namespace(config=path, cfg_options=[], launcher="none", work_dir=None))
    model = _skeleton(path, cfg)
    size = tuple(input_size or SIZES.get(cfg.get("default_scope", "mmengine"), SIZES["mmdet"]))
    if len(size) > 2 or min(size) < 1:
        raise UserError(f"--input-size takes one or two positive numbers, got {' '.join(map(str, size))}")
    size = size * 2 if len(size) == 1 else size
    try:
        cost = count(model, size)
    except (TypeError, ValueError, RuntimeError) as error:
        shown = " x ".join(map(str, size))
        raise UserError(f"{path}: no count for images of {shown}: {str(error).splitlines()[0]}") from error
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return {
        "name": path,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(parts.values()),
        "parameters_by_part": {name: number for name, number in parts.items() if number},
        "input": [3, *size],
        "multiply_adds": sum(cost.values()),
        "multiply_adds_by_kind": cost,
        "convention": f"{CONVENTION}, 4 per number of a resized map",
    }


def _skeleton(path: str, cfg: Any) -> Any:
    """The network in eval mode on the meta device: shapes without storage."""
    import torch
    from mmengine.registry import MODELS, init_default_scope

    if "model" not in cfg:
        raise UserError(f"{path} describes no network (model); part of a configuration alone cannot be counted")
    try:
        init_default_scope(cfg.get("default_scope", "mmengine"))
        with torch.device("meta"), MODELS.switch_scope_and_registry(None) as registry:
            return registry.build(cfg.model).eval()
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: its network cannot be built: {words}; vmamba doctor --config {path}") from error

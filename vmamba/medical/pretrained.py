"""Pre-trained weights on their way into a segmentation network: what fits is loaded, what does not is an error."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from vmamba.checkpoint import LoadReport, fit, load_checkpoint, read
from vmamba.errors import UserError

_OWN = re.compile(r"outputs\.|.*\bpos_embed$")  # of the task and of the size: never taken from a checkpoint


def load_pretrained(network: nn.Module, path: Path) -> LoadReport:
    """Start ``network`` from an encoder.ckpt of ``medseg pretrain``, or from another training of the same network.

    Args:
        network: to be trained; its last layers (``outputs``) keep their first values, as in nnU-Net.
        path: encoder.ckpt or the run folder with it, a checkpoint of ``medseg train`` or nnU-Net's, or a file of the
            original code of the network.

    Returns:
        What was loaded; ``missing`` lists what keeps its first values.

    Raises:
        UserError: no such checkpoint, or something in it has no place in the network; nothing has been loaded then.
    """
    path = path / "encoder.ckpt" if path.is_dir() else path
    try:
        stored = read(path)
        native, report = fit(_weights(stored), network)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"pre-trained weights: {' '.join(str(error).split())}") from error
    wrong = [name for name in (*report.unexpected, *report.misshapen) if not _OWN.match(name)]
    fitting = {name: native[name] for name in report.loaded if not _OWN.match(name)}
    if wrong or not fitting:
        first = wrong[0] if wrong else "none"
        shapes = report.misshapen.get(first)
        why = f"{first} is {_by(shapes[0])} there and {_by(shapes[1])} here" if shapes else f"no place for {first}"
        made = f", made for {stored['network']}" if isinstance(stored.get("network"), str) else ""
        raise UserError(
            f"{path}{made}: does not fit this {type(network).__name__}: {len(fitting)} tensors fit, {len(wrong)} do "
            f"not ({why}); expected encoder.ckpt of vmamba medseg pretrain for the same network, options and channels"
        )
    loaded = load_checkpoint(network, fitting, strict=False)
    loaded.layout = report.layout
    return loaded


def describe(report: LoadReport, path: Path) -> str:
    """What was loaded and what was not, part by part, in two lines."""
    kept = ", ".join(f"{part} ({n})" for part, n in _parts(report.missing).items()) or "nothing"
    taken = ", ".join(f"{part} ({n})" for part, n in _parts(report.loaded).items())
    return f"{path}: {len(report.loaded)} tensors loaded: {taken}\nfirst values are kept by {kept}"


def _weights(stored: Mapping) -> Mapping:
    """The tensors of a Lightning checkpoint of ``medseg train`` without its prefix; others as they are."""
    state = stored.get("state_dict")
    if not isinstance(state, Mapping):
        return stored
    return {key.removeprefix("network."): tensor for key, tensor in state.items()}


def _parts(names: list[str]) -> dict[str, int]:
    return dict(Counter(name.split(".")[0] for name in names))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"

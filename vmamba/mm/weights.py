"""Weights of a backbone from files of the original code or ours: all of them, or an error."""

from collections.abc import Mapping
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import print_log
from torch import Tensor, nn

from vmamba import checkpoint
from vmamba.errors import UserError
from vmamba.inert import inert


def fitted(source: Mapping, pyramid: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``source`` in the pyramid's names and shapes; those outside its body may be missing.

    A classifier has no norms of outputs and no neck: these keep their values.

    Raises:
        UserError: a part of the body is missing or misshapen, or there is more than belongs to it: another network.
    """
    native, report = checkpoint.fit(source, pyramid)
    report.missing = [name for name in report.missing if name.startswith("body.")]
    if not report.ok:
        raise UserError(f"the checkpoint is not of this backbone; {report}")
    return native


def load(pyramid: nn.Module, checkpoint: str, prefix: str | None = None) -> None:
    """Load the weights at a path or an address, those under ``prefix`` alone if there is one (``init_cfg``'s fields).

    Raises:
        FileNotFoundError: no such file; ValueError: it is not a checkpoint; UserError: it is of another network.
    """
    content = read(checkpoint)
    if prefix is not None:
        content = _part(content, prefix, checkpoint)
    try:
        native = fitted(content, pyramid)
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    pyramid.load_state_dict(native, strict=False)
    print_log(f"backbone: {len(native)} tensors from {checkpoint}", logger="current")


def read(source: str) -> Mapping:
    """The content of a file or of what lies at an http address (kept in PyTorch's hub folder), without running code.

    Raises:
        FileNotFoundError: no such file; ValueError: it is not a checkpoint.
    """
    if urlparse(source).scheme not in ("http", "https"):
        return checkpoint.read(source)
    if get_rank() > 0:
        barrier()
    with inert():
        state = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
    if get_rank() == 0:
        barrier()
    return state


def _part(content: Mapping, prefix: str, source: str) -> dict[str, Tensor]:
    """The tensors under ``prefix``, without it."""
    for envelope in checkpoint.ENVELOPES:
        content = content[envelope] if isinstance(content.get(envelope), Mapping) else content
    prefix = prefix.removesuffix(".") + "."
    part = {key.removeprefix(prefix): value for key, value in content.items() if str(key).startswith(prefix)}
    if not part:
        shown = ", ".join(sorted({str(key).split(".")[0] + "." for key in content}))
        raise ValueError(f"{source} has nothing under {prefix!r}; it has {shown}")
    return part

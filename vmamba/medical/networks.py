"""Networks for a plan: trainers' names of the published code, or any segmentation network of the zoo."""

import difflib
from math import ceil
from typing import Any

from torch import Tensor, nn

import vmamba
from vmamba.errors import UserError
from vmamba.medical import plain_unet
from vmamba.medical.plan import Configuration
from vmamba.registry import entries

TRAINERS = {  # the published nnU-Net trainers and their networks
    "nnUNetTrainerVMUNet": "vmunet",
    "nnUNetTrainerMHSUNet": "mhs_unet_4h",
    "nnUNetTrainerUMambaBot": "umamba_bot",
    "nnUNetTrainerUMambaEnc": "umamba_enc",
    "nnUNetTrainerUMambaEncNoAMP": "umamba_enc",
    "nnUNetTrainerLightMUNet": "lightm_unet",
    "nnUNetTrainerSwinUMamba": "swin_umamba",
    "nnUNetTrainerSwinUMambaD": "swin_umamba_d",
    "nnUNetTrainerSwinUMambaDNoAMP": "swin_umamba_d",
    "nnUNetTrainerMSVMUNet": "msvm_unet_tiny",
}
OLDER = {  # what the same trainer's name meant in the code's first generation
    "nnUNetTrainerUMambaBot": "umamba_v1_bot",
    "nnUNetTrainerUMambaEnc": "umamba_v1_enc",
    "nnUNetTrainerUMambaEncNoAMP": "umamba_v1_enc",
}


def network_name(trainer: str, axes: int) -> str:
    """The zoo's name of a trainer or network: its own, or with _2d or _3d behind it. UserError if there is none.

    nnU-Net's own network, :data:`vmamba.medical.plain_unet.NAMES`, keeps its name.
    """
    if trainer in plain_unet.NAMES:
        return trainer
    base = TRAINERS.get(trainer, trainer)
    for name in (f"{base}_{axes}d", base):
        if name in entries():
            return name
    near = difflib.get_close_matches(trainer, [*TRAINERS, *entries()], n=3) or list(TRAINERS)
    raise UserError(f"-tr {trainer}: no such network for {axes}d; choose from {', '.join(near)} or vmamba list")


def build(trainer: str, c: Configuration, channels: int, outputs: int, options: dict[str, Any]) -> nn.Module:
    """The network of ``trainer`` for a configuration; a network that follows plans takes its stages from there."""
    if trainer in plain_unet.NAMES:
        return _plain(trainer, c, channels, outputs, options)
    name = network_name(trainer, c.axes)
    settings = entries()[name].settings
    given: dict[str, Any] = {}
    if "strides" in settings:
        given = {"features": c.features, "strides": c.strides, "kernels": c.kernels}
        given |= {"patch": c.patch} if "patch" in settings else {}
    try:
        network = vmamba.create_model(name, num_classes=outputs, in_chans=channels, **given | options)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"network {name!r} for {c.name}: {error}") from error
    axes = getattr(network, "axes", None)
    if axes != c.axes:
        fits = "segments volumes" if axes == 3 else "segments images" if axes == 2 else "does not segment"
        raise UserError(f"-tr {trainer}: {name} {fits}, {c.name} needs a network of {c.axes} dimensions")
    return network


def _plain(trainer: str, c: Configuration, channels: int, outputs: int, options: dict[str, Any]) -> nn.Module:
    given = {"features": c.features, "strides": c.strides, "kernels": c.kernels, "convolutions": c.convolutions}
    odd = [key for key in options if key not in (*given, "deep_supervision")]
    if odd:
        raise UserError(f"-tr {trainer} --set {odd[0]}=...: unknown; choose from {', '.join(given)}")
    return plain_unet.PlainConvUNet(channels, outputs, **given | {k: v for k, v in options.items() if k in given})


def raise_patch(network: nn.Module, patch: tuple[int, ...]) -> tuple[int, ...]:
    """The patch with its sides raised to multiples of the network's stride."""
    stride: Any = getattr(network, "stride", 1)
    strides = (stride,) * len(patch) if isinstance(stride, int) else stride
    return tuple(ceil(n / s) * s for n, s in zip(patch, strides, strict=True))


def logits(network: nn.Module, x: Tensor) -> Tensor:
    """The finest map of logits, also of a network whose ``forward`` ends in a sigmoid or gives several maps."""
    plain = getattr(network, "logits", None)
    return plain(x) if plain else network(x)

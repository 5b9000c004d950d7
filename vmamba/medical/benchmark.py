"""What ``vmamba medseg benchmark`` measures: networks at their published patch and batch, nnU-Net's beside."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import vmamba
from vmamba.errors import UserError
from vmamba.medical.labelset import classes
from vmamba.medical.losses import LabelLoss
from vmamba.medical.plain_unet import PlainConvUNet
from vmamba.medical.topology import CONVOLUTIONS, topology
from vmamba.registry import entries

NNUNET = "dynamic_network_architectures"
PLAIN = "PlainConvUNet"


@dataclass(frozen=True)
class Setup:
    """Patches (batch, channels, *patch) of data with ``classes``, the background among them; ``source`` in words."""

    patch: tuple[int, ...]
    batch: int
    channels: int
    classes: int
    source: str

    @property
    def size(self) -> str:
        """The patch in words."""
        return " x ".join(map(str, self.patch))


CT = Setup((40, 224, 192), 2, 1, 14, "U-Mamba, AbdomenCT")
MR = Setup((320, 320), 30, 1, 14, "U-Mamba, AbdomenMR 2d")
ISIC = Setup((256, 256), 32, 3, 2, "VM-UNet, ISIC18")
SYNAPSE = Setup((224, 224), 32, 3, 9, "TransUNet's Synapse")
LITS = Setup((128, 128, 128), 2, 1, 3, "nnU-Net's plan of LiTS")
XRAY = Setup((512, 512), 12, 3, 2, "nnU-Net's rule for 512 x 512")
BTCV = Setup((96, 96, 96), 2, 1, 14, "MambaMIM, BTCV")
PUBLISHED = {
    "umamba_bot_3d": CT,
    "umamba_enc_3d": CT,
    "umamba_v1_bot_3d": CT,
    "umamba_v1_enc_3d": CT,
    "lightm_unet_3d": LITS,
    "hymamba": BTCV,
    "umamba_bot_2d": MR,
    "umamba_enc_2d": MR,
    "umamba_v1_bot_2d": MR,
    "umamba_v1_enc_2d": MR,
    "swin_umamba": MR,
    "swin_umamba_d": MR,
    "vmunet": ISIC,
    "mhs_unet_3h": ISIC,
    "mhs_unet_4h": ISIC,
    "vmunet_synapse": SYNAPSE,
    "msvm_unet_tiny": SYNAPSE,
    "msvm_unet_small": SYNAPSE,
    "lightm_unet_2d": XRAY,
}


def setups(names: Sequence[str], patch: Sequence[int] | None, batch: int | None) -> dict[str, Setup]:
    """The setup of each network, with another patch or batch if they are given; UserError for an unknown name."""
    found = {}
    for name in names:
        if name not in PUBLISHED:
            raise UserError(f"{name}: no published setup; choose from {', '.join(PUBLISHED)}")
        setup = PUBLISHED[name]
        if patch and len(patch) != len(setup.patch):
            raise UserError(f"--patch {' '.join(map(str, patch))}: {name} needs {len(setup.patch)} sides")
        asked = replace(setup, patch=tuple(patch or setup.patch), batch=batch or setup.batch)
        found[name] = setup if asked == setup else replace(asked, source="as asked")
    return found


def baseline() -> str:
    """The name under which nnU-Net's network, or what stands in for it, is measured."""
    if find_spec(NNUNET):
        return f"{PLAIN} ({NNUNET.replace('_', '-')} {version(NNUNET)})"
    return f"DynUNet (MONAI {version('monai')}, for want of {NNUNET.replace('_', '-')})"


def build(name: str, setup: Setup) -> nn.Module:
    """A network of the zoo with random weights, or :func:`baseline`'s."""
    if name not in entries():
        return plain_unet(setup)
    settings = entries()[name].settings
    side = setup.patch if "strides" in settings else setup.patch[0]
    options: dict[str, Any] = {"patch": side} if "patch" in settings else {}
    return vmamba.create_model(name, num_classes=setup.classes, in_chans=setup.channels, **options)


def plain_unet(setup: Setup) -> nn.Module:
    """nnU-Net's U-Net for this patch, of the topology that its rule gives; U-Mamba was published with the same ones."""
    axes = len(setup.patch)
    plan = topology(_spacing(setup.patch), setup.patch)
    if not find_spec(NNUNET):
        from monai.networks.nets.dynunet import DynUNet

        up = plan.strides[1:]
        return DynUNet(axes, setup.channels, setup.classes, plan.kernels, plan.strides, up, filters=plan.features)
    counts = [CONVOLUTIONS] * len(plan.features)
    shape = {"features": plan.features, "strides": plan.strides, "kernels": plan.kernels}
    return PlainConvUNet(setup.channels, setup.classes, **shape, convolutions=(counts, counts[1:]))


def _spacing(patch: Sequence[int]) -> list[float]:
    """Slices of a flat patch are thick, as AbdomenCT's are: 2.5 mm against 0.8."""
    flat = len(patch) == 3 and max(patch) > 3 * patch[0]
    return [2.5, 0.8, 0.8] if flat else [1.0] * len(patch)


@dataclass
class Example:
    """One batch of random patches, and the loss on them: nnU-Net's, deeply supervised where the network is."""

    image: Tensor
    label: Tensor
    loss: LabelLoss

    @classmethod
    def make(cls, setup: Setup, device: torch.device) -> "Example":
        """Seeded."""
        draw = torch.Generator().manual_seed(0)
        image = torch.randn(setup.batch, setup.channels, *setup.patch, generator=draw).to(device)
        label = torch.randint(0, setup.classes, (setup.batch, 1, *setup.patch), generator=draw).to(device)
        return cls(image, label, LabelLoss(classes(setup.classes - 1), batch_dice=len(setup.patch) == 2))


def supervise(network: Any, deep: bool) -> bool:
    """Switches deep supervision on or off where the network has several outputs; returns whether it is on.

    As in training by ``vmamba medseg train``.
    """
    if len(getattr(network, "outputs", ())) > 1:
        network.deep_supervision = deep
        return deep
    return False

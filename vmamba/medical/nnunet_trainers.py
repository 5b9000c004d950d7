"""Trainers for an installed nnunetv2: its planning, training and commands with this package's networks.

nnU-Net looks for trainers in the folder of the environment variable ``nnUNet_extTrainer``. A file there with the line
``from vmamba.medical.nnunet_trainers import *`` gives it every trainer of :data:`vmamba.medical.networks.TRAINERS`:

    nnUNetv2_train 900 3d_fullres 0 -tr nnUNetTrainerUMambaBot
"""

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # pyright: ignore[reportMissingImports]
from torch import nn

from vmamba.medical.networks import TRAINERS, build, network_name
from vmamba.medical.plan import parse
from vmamba.registry import entries

CUDA = torch.device("cuda")


class _Trainer(nnUNetTrainer):
    """A network of the zoo in nnU-Net's loop; those that follow plans are trained with deep supervision."""

    base = ""  # the zoo's name, without _2d or _3d

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        name = network_name(self.base, len(self.configuration_manager.patch_size))
        self.enable_deep_supervision = "strides" in entries()[name].settings

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network for these plans, also when nnU-Net predicts."""
        c = parse("", configuration_manager.configuration)
        network: Any = build(cls.base, c, num_input_channels, num_output_channels, {})
        network.deep_supervision = enable_deep_supervision
        return network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Several maps in training, the finest otherwise."""
        network = self.network.module if self.is_ddp else self.network
        getattr(network, "_orig_mod", network).deep_supervision = enabled


__all__ = list(TRAINERS)  # pyright: ignore[reportUnsupportedDunderAll]
globals().update({name: type(name, (_Trainer,), {"base": base}) for name, base in TRAINERS.items()})

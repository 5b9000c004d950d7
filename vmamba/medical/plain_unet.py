"""nnU-Net's own network, which others are compared to: PlainConvUNet of ``dynamic_network_architectures``."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.unet_blocks import LAYERS, SLOPE, init_conv

NAMES = ("nnUNetTrainer", "plain_conv_unet")  # nnU-Net's trainer, and the network as others of the zoo are called
PACKAGE = "dynamic-network-architectures"


class PlainConvUNet(nn.Module):
    """(b, channels, *grid) -> logits (b, outputs, *grid); with ``deep_supervision`` of every decoder level.

    Names of weights are nnU-Net's, so that either program loads the other's.

    Args:
        channels, outputs: of the image and of the logits.
        features, strides, kernels, convolutions: of each stage, as plans have them; ``convolutions`` in the encoder and
            in the decoder.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
        convolutions: tuple[Sequence[int], Sequence[int]],
    ):
        super().__init__()
        self.axes = len(strides[0])
        self.stride = tuple(math.prod(axis) for axis in zip(*strides, strict=True))
        layers: Any = LAYERS[self.axes]
        body = network_class()(
            channels,
            len(features),
            list(features),
            layers.conv,
            kernels,
            strides,
            list(convolutions[0]),
            outputs,
            list(convolutions[1]),
            conv_bias=True,
            norm_op=layers.norm,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"negative_slope": SLOPE, "inplace": True},
        )
        self.encoder, self.decoder = body.encoder, body.decoder
        self.apply(init_conv)

    @property
    def outputs(self) -> nn.ModuleList:
        """The layers that end in logits, of each decoder level."""
        return self.decoder.seg_layers

    @property
    def deep_supervision(self) -> bool:
        """Whether the logits of all levels are returned, the finest first."""
        return self.decoder.deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, value: bool) -> None:
        self.decoder.deep_supervision = value

    def forward(self, x: Tensor) -> "Tensor | list[Tensor]":
        """(b, channels, *grid) -> (b, outputs, *grid), or a list of such maps"""
        return self.decoder(self.encoder(x))

    def logits(self, x: Tensor) -> Tensor:
        """(b, channels, *grid) -> (b, outputs, *grid)"""
        maps = self(x)
        return maps[0] if isinstance(maps, list) else maps


def network_class() -> Any:
    """nnU-Net's class; UserError where it is not installed."""
    try:
        from dynamic_network_architectures.architectures import unet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        advice = f"pip install --no-deps {PACKAGE} (its own requirement of timm does not fit)"
        raise UserError(f"nnU-Net's own network needs {PACKAGE}: {error}; {advice}") from error
    return unet.PlainConvUNet

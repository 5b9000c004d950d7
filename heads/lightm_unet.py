"""LightM-UNet (arXiv:2403.05246), for images and for volumes. Code: MrBlankness/LightM-UNet, Apache-2.0.

A U-Net whose encoder is made of Mamba layers alone, with the whole map as one sequence, and whose decoder is made of
depthwise convolutions. This is the code as corrected on 29 March 2024; weights of the version before do not fit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.convbn import Scale
from vmamba.registry import register
from vmamba.segmentor import Segmentor
from vmamba.unet_blocks import LAYERS, MAMBA, MAMBA_KEYS, MambaLayer

GROUPS = 8  # of every group norm


class ResidualMamba(MambaLayer):
    """linear(norm(mamba(norm(x)) + scale x)): (b, dim, *grid) -> (b, out_dim, *grid); both norms are the same one."""

    def __init__(self, dim: int, out_dim: int, *, mixer: Callable[..., nn.Module] = MAMBA, device=None, dtype=None):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, mixer=mixer, **dd)
        self.scale = Scale(1, **dd)
        self.proj = nn.Linear(dim, out_dim, **dd)

    def mix(self, x: Tensor) -> Tensor:
        """(b, *grid, dim) -> (b, *grid, out_dim)"""
        return self.proj(self.norm(self.mixer(self.norm(x)) + self.scale(x)))


class MambaBlock(nn.Module):
    """x + layer(relu(norm(layer(relu(norm(x)))))) with :class:`ResidualMamba` layers."""

    def __init__(self, dim: int, *, layer: Callable[..., nn.Module], device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1, self.norm2 = (nn.GroupNorm(GROUPS, dim, **dd) for _ in range(2))
        self.layer1, self.layer2 = (layer(dim, dim, **dd) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *grid) -> (b, c, *grid)"""
        y = self.layer1(F.relu(self.norm1(x)))
        return x + self.layer2(F.relu(self.norm2(y)))


class UpBlock(nn.Module):
    """relu(norm(conv(relu(norm(x))) + scale x)) with a depthwise and a pointwise convolution."""

    def __init__(self, axes: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1, self.norm2 = (nn.GroupNorm(GROUPS, dim, **dd) for _ in range(2))
        self.conv = separable(axes, dim, dim, **dd)
        self.scale = Scale(1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *grid) -> (b, c, *grid)"""
        return F.relu(self.norm2(self.conv(F.relu(self.norm1(x))) + self.scale(x)))


def separable(axes: int, dim: int, out_dim: int, kernel: int = 3, *, bias: bool = False, **dd: Any) -> nn.Sequential:
    """A depthwise convolution and a pointwise one."""
    conv = LAYERS[axes].conv
    depthwise = conv(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=bias, **dd)
    return nn.Sequential(depthwise, conv(dim, out_dim, 1, bias=bias, **dd))


class LightMUNet(Segmentor):
    """Image (b, in_chans, *grid), its sides multiples of 8, -> logits (b, num_classes, *grid).

    Args:
        axes: 2 for images (h, w), 3 for volumes (d, h, w).
        dim: channels of the first level, a multiple of 8; each level has twice those of the one before.
        depths: blocks per level of the encoder, finest first.
        depths_decoder: blocks per level of the decoder, coarsest first.
        scan: the order in which the Mamba layers read the map.
        **segmentor: ``num_classes``, ``in_chans``, ``device``, ``dtype`` of :class:`Segmentor`.

    Raises:
        ValueError: the levels of encoder and decoder do not fit, or ``dim`` is no multiple of 8.
    """

    def __init__(
        self,
        *,
        axes: int = 2,
        dim: int = 32,
        depths: Sequence[int] = (1, 2, 2, 4),
        depths_decoder: Sequence[int] = (1, 1, 1),
        scan: Any = "raster",
        **segmentor,
    ):
        super().__init__(**segmentor)
        if dim % GROUPS:
            raise ValueError(f"dim must be a multiple of {GROUPS}, got {dim}")
        if len(depths_decoder) != len(depths) - 1:
            raise ValueError(f"{len(depths)} levels take {len(depths) - 1} decoder levels, got {tuple(depths_decoder)}")
        self.axes, self.stride = axes, 2 ** len(depths_decoder)
        dd, layers = self._dd, LAYERS[axes]
        dims = [dim * 2**i for i in range(len(depths))]
        layer = partial(ResidualMamba, mixer=partial(MAMBA, scan=scan))
        self.stem = separable(axes, self.in_chans, dim, **dd)
        self.encoder = nn.ModuleList()
        for i, depth in enumerate(depths):
            down = [layer(dims[i - 1], dims[i], **dd), layers.max_pool(2)] if i else []
            blocks = [MambaBlock(dims[i], layer=layer, **dd) for _ in range(depth)]
            self.encoder.append(nn.Sequential(nn.Sequential(*down), *blocks))
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        mode = {2: "bilinear", 3: "trilinear"}[axes]
        for c, depth in zip(dims[-2::-1], depths_decoder, strict=True):
            finer = nn.Upsample(scale_factor=2, mode=mode, align_corners=False)
            self.up.append(nn.Sequential(layers.conv(2 * c, c, 1, bias=False, **dd), finer))
            self.decoder.append(nn.Sequential(*(UpBlock(axes, c, **dd) for _ in range(depth))))
        self.norm = nn.GroupNorm(GROUPS, dim, **dd)
        self.outputs = nn.ModuleList([separable(axes, dim, self.num_classes, 1, bias=True, **dd)])
        self.init_weights()

    def decode(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, *grid) -> [(b, dim, *grid)]"""
        x, skips = self.stem(x), []
        for level in self.encoder:
            x = level(x)
            skips.append(x)
        x = skips.pop()
        for up, level in zip(self.up, self.decoder, strict=True):
            x = level(up(x) + skips.pop())
        return [F.relu(self.norm(x))]


VARIANTS: dict[str, dict[str, Any]] = {
    "lightm_unet_2d": dict(axes=2, num_classes=2, in_chans=3),
    "lightm_unet_3d": dict(axes=3, num_classes=3, in_chans=1),
}

KEYS = [
    (r"^convInit\.(\d)\.conv\.", r"stem.\1."),
    (r"^down_layers\.", "encoder."),
    (r"^up_samples\.(\d+)\.0\.conv\.", r"up.\1.0."),
    (r"^up_layers\.", "decoder."),
    (r"(decoder\.\d+\.\d+\.conv\.\d)\.conv\.", r"\1."),
    (r"^conv_final\.0\.", "norm."),
    (r"^conv_final\.2\.(\d)\.conv\.", r"outputs.0.\1."),
    (r"^(encoder\.\d+\.\d+)\.conv([12])\.", r"\1.layer\2."),
    (r"\.skip_scale$", ".scale.weight"),
    (r"\.mamba\.", ".mixer."),
    *MAMBA_KEYS,
]

register(
    LightMUNet,
    VARIANTS,
    keys=KEYS,
    paper="2403.05246",
    origin="https://github.com/MrBlankness/LightM-UNet",
    license="apache-2.0",
    sides={"lightm_unet_3d": (96, 96, 96)},
)

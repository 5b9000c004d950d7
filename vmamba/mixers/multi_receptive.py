"""Mixers of MobileMamba: some channels look far, some look near, the rest pass (arXiv:2411.15941, section 3.2)."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import make_divisible
from timm.models import register_notrace_module
from timm.utils import reparameterize_model
from torch import Tensor, nn

from vmamba.block import Conv2d
from vmamba.convbn import ConvBN, Scale, ZeroBatchNorm2d
from vmamba.mixers.ss2d import SS2D
from vmamba.wavelet import Wavelet


class ScaledConv(nn.Module):
    """A depthwise convolution, then one learned factor per channel, which starts at 0.1."""

    def __init__(self, dim: int, kernel: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False, **dd)
        self.scale = Scale(dim, init=0.1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return self.scale(self.conv(x))

    def fuse(self) -> nn.Module:
        """The convolution with the factors in its weight."""
        self.scale.into(self.conv)
        return self.conv


@register_notrace_module
class WaveletConv(nn.Module):
    """Depthwise convolutions of a map's wavelet bands, level by level: k x k sees 2k x 2k, then 4k x 4k pixels.

    Each level splits the low band of the level before, as it was before the convolution, and adds its result to that
    band on the way back.

    Args:
        dim: channels c.
        kernel: odd size of the convolutions.
        levels: how often the low band is split.
        wavelet: a discrete wavelet of PyWavelets.

    Raises:
        ValueError: there is no level, or PyWavelets does not know the wavelet.
    """

    def __init__(
        self, dim: int, *, kernel: int = 3, levels: int = 1, wavelet: "str | Any" = "haar", device=None, dtype=None
    ):
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels must be at least 1, got {levels}")
        self.wavelet = Wavelet(wavelet)
        self.convs = nn.Sequential(*[ScaledConv(4 * dim, kernel, device=device, dtype=dtype) for _ in range(levels)])

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        levels = []
        for conv in self.convs:
            h, w = x.shape[1:3]
            bands = self.wavelet.analyse(x)  # (b, h / 2, w / 2, c, 4)
            levels.append((conv(bands.flatten(-2)).unflatten(-1, (-1, 4)), h, w))
            x = bands[..., 0]
        bands, h, w = levels.pop()
        y = self.wavelet.synthesise(bands, h, w)
        for bands, h, w in reversed(levels):
            low, high = bands.split([1, 3], -1)
            y = self.wavelet.synthesise(torch.cat([low + y[..., None], high], -1), h, w)
        return y


class LightSS2D(SS2D):
    """SS2D with one state per channel, batch norms in its projections, and start values of its own."""

    dt_proj: nn.Parameter
    dt_bias: nn.Parameter
    out_proj: Any

    def __init__(self, dim: int, *, expand: float = 2.0, scan: "str | Callable" = "bidirectional", **gated):
        super().__init__(dim, state=1, expand=expand, scan=scan, linear=ConvBN, **gated)

    def reset_parameters(self) -> None:
        """A = -1, D = 1, delta's projection and bias uniform in [0, 0.1] ("v2" of VMamba's initialisations)."""
        super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]
        nn.init.uniform_(self.dt_proj, 0, 0.1)
        nn.init.uniform_(self.dt_bias, 0, 0.1)


class WaveletMamba(nn.Module):
    """scale * SS2D(x) + WaveletConv(x): long range with the edges that a scan of the whole map smooths away (3.3).

    Args:
        dim: channels c.
        kernel: odd size of the convolutions of wavelet bands.
        expand: inner channels of the SS2D over c.
        levels, wavelet: of :class:`WaveletConv`.
        scan: the order in which the SS2D reads the map.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel: int = 3,
        expand: float = 2.0,
        levels: int = 1,
        wavelet: "str | Any" = "haar",
        scan: "str | Callable" = "bidirectional",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ssm = LightSS2D(dim, expand=expand, scan=scan, **dd)
        self.scale = Scale(dim, **dd)
        self.wavelet = WaveletConv(dim, kernel=kernel, levels=levels, wavelet=wavelet, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        return self.scale(self.ssm(x)) + self.wavelet(x)

    def fuse(self) -> nn.Module:
        """Itself with fused projections and the scale in the last of them."""
        reparameterize_model(self, inplace=True)
        if isinstance(self.scale, Scale):
            self.scale.into(self.ssm.out_proj)
            self.scale = nn.Identity()
        return self


class MultiReceptiveMixer(nn.Module):
    """Channels split three ways: wavelets and a scan, one k x k convolution, nothing; then ReLU and a projection.

    Args:
        dim: channels c, at least 16.
        kernel: odd size of the convolutions.
        global_ratio: share of the channels that is scanned, rounded to a multiple of 16.
        local_ratio: share of the channels that is convolved, rounded down, at most what is left.
        expand, levels, wavelet, scan: of :class:`WaveletMamba`.

    Raises:
        ValueError: the rounded share of scanned channels exceeds ``dim``.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel: int = 3,
        global_ratio: float = 0.8,
        local_ratio: float = 0.2,
        expand: float = 2.0,
        levels: int = 1,
        wavelet: "str | Any" = "haar",
        scan: "str | Callable" = "bidirectional",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        far = make_divisible(int(global_ratio * dim), 16, round_limit=0)
        if far > dim:
            raise ValueError(f"{global_ratio} of {dim} channels is rounded to {far}, more than there are")
        near = min(int(local_ratio * dim), dim - far)
        self.widths = [far, near, dim - far - near]
        self.far = WaveletMamba(far, kernel=kernel, expand=expand, levels=levels, wavelet=wavelet, scan=scan, **dd)
        self.near = local_conv(near, kernel, **dd) if near else nn.Identity()
        self.act = nn.ReLU()
        self.proj = ConvBN(dim, dim, bn=ZeroBatchNorm2d, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        far, near, rest = x.split(self.widths, -1)
        return self.proj(self.act(torch.cat([self.far(far), self.near(near), rest], -1)))


def local_conv(dim: int, kernel: int, *, device=None, dtype=None) -> nn.Sequential:
    """(b, h, w, c) -> (b, h, w, c): depthwise k x k convolution, ReLU, a factor per channel, each with a batch norm."""
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    return nn.Sequential(ConvBN(dim, dim, kernel, groups=dim, **dd), nn.ReLU(), ConvBN(dim, dim, groups=dim, **dd))

"""What the two-dimensional mixers share: project, convolve, activate, scan, norm, gate, project."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from vmamba.block import Conv2d
from vmamba.kernels.depthwise_silu import depthwise_silu, fused
from vmamba.narrow import Layer, Narrowed, Parts, watched
from vmamba.norm import LayerNorm

LINEAR = partial(nn.Linear, bias=False)


class GatedMixer(Narrowed):
    """(b, h, w, c) -> (b, h, w, c) around :meth:`scan_map`, which a mixer defines.

    Args:
        dim: channels c of the map.
        inner: channels d inside.
        conv: size of the depthwise convolution; 1 leaves it out.
        conv_bias: whether that convolution has a bias.
        gate: activation of the gate branch (``nn.SiLU``), or None for no gate.
        act: activation after the convolution.
        norm: builds the output norm, ``norm(d, device=..., dtype=...)``, on channels-last maps.
        linear: builds the projections in and out, ``linear(from, to, device=..., dtype=...)``; each has a ``weight``.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        *,
        conv: int = 3,
        conv_bias: bool = True,
        gate: Callable[[], nn.Module] | None = nn.SiLU,
        act: Callable[[], nn.Module] = nn.SiLU,
        norm: Callable[..., nn.Module] | None = None,
        linear: Callable[..., Any] = LINEAR,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = linear(dim, inner if gate is None else 2 * inner, **dd)
        self.conv = (
            Conv2d(inner, inner, conv, padding=conv // 2, groups=inner, bias=conv_bias, **dd)
            if conv > 1
            else nn.Identity()
        )
        self.act = act()
        self.norm = LayerNorm(inner, **dd) if norm is None else norm(inner, **dd)
        self.gate = None if gate is None else gate()
        self.out_proj = linear(inner, dim, **dd)

    def scan_map(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d), float32 or wider."""
        raise NotImplementedError

    def scan_weights(self) -> tuple[Tensor, ...]:
        """What :meth:`scan_map` takes after x: weights of its matrix products, perhaps in a narrower type."""
        return ()

    def parts(self) -> Parts:
        """The projections, the convolution where gradients are asked for, and :meth:`scan_weights`."""
        learns = torch.is_grad_enabled() and type(self.conv) is Conv2d
        layers = (self.in_proj, self.out_proj, self.conv) if learns else (self.in_proj, self.out_proj)
        return layers, self.scan_weights()

    def run(self, x: Tensor, layers: Sequence[Layer], weights: Sequence[Tensor]) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        in_proj, out_proj, *convs = layers
        conv = convs[0] if convs else self.conv
        x, z = in_proj(x), None
        if self.gate is not None:
            x, z = x.chunk(2, -1)
        y = self.scan_map(self._activated(x, conv), *weights)
        y = self.norm(y.to(self.out_proj.weight.dtype))
        return out_proj(y if self.gate is None else y * self.gate(z))

    def _activated(self, x: Tensor, conv: Layer) -> Tensor:
        """The activation of the convolution; one kernel on a GPU, without gradients, which cuDNN computes faster."""
        if not torch.is_grad_enabled() and self.filters_depthwise():
            weight, bias = cast(Conv2d, self.conv).weight, cast(Conv2d, self.conv).bias
            if fused(x, weight):
                dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
                return depthwise_silu(x.to(dtype), weight, bias)
        return self.act(conv(x))

    @torch.compiler.assume_constant_result
    def filters_depthwise(self) -> bool:
        """Whether the convolution filters each channel by itself, the map keeps its size, and SiLU follows."""
        conv, act = self.conv, self.act
        if type(conv) is not Conv2d or not conv.groups == conv.in_channels == conv.out_channels:
            return False
        same = conv.padding == tuple(size // 2 for size in conv.kernel_size)
        plain = conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        return same and plain and type(act) is nn.SiLU and not watched(conv, act)

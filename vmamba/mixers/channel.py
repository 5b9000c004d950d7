"""A selective scan over channels: which channel reaches which depends on the image (MambaMixer, arXiv:2403.19888).

The map transposed is a sequence of channels whose features are the pixels. The paper leaves open how its layers, which
are as wide as the map has pixels, fit maps of another size. Here all pixels share what the paper has for each of them
(A, D and delta), and what it computes from all pixels of a channel (delta, B and C) is computed from a summary: the
channel's means over ``grid`` x ``grid`` cells of the map. So the order of the pixels within a cell does not matter; the
order of the channels is forwards and backwards, as in the paper's general form.
"""

import math
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.kernels.scan2d import scan2d
from vmamba.mixers.gated import GatedMixer
from vmamba.scans import Scan

START = 0.01  # delta at first: the middle of Mamba's range, from 1e-3 to 0.1, on a logarithmic scale


@register_notrace_module
class ChannelMixer(GatedMixer):
    """(b, h, w, c) -> (b, h, w, c): a linear layer, scans of its d channels c', summed and gated, a linear layer::

        delta, B, C = softplus(w . s + bias), W_B s, W_C s     s: summary of channel c', in each direction
        state[c'] = exp(delta A) state[c' - 1] + delta B u[c']                     in each pixel
        y[c'] = C . state[c'] + D u[c']

    Args:
        dim: channels c; the scans run over d = expand * c channels.
        state: states n of each pixel.
        expand: d / c.
        grid: the summary of a channel has grid * grid numbers.
        device, dtype: of the parameters.
    """

    def __init__(self, dim: int, *, state: int = 16, expand: float = 2.0, grid: int = 7, device=None, dtype=None):
        super().__init__(dim, int(expand * dim), conv=1, device=device, dtype=dtype)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.order, self.grid, self.state = Scan("bidirectional"), grid, state
        k = self.order.count
        self.x_proj = nn.Parameter(torch.empty(k, 1 + 2 * state, grid * grid, **dd))
        self.dt_bias = nn.Parameter(torch.empty(k, **dd))
        self.A_log = nn.Parameter(torch.empty(k, state, **dd))
        self.D = nn.Parameter(torch.empty(k, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -(1..n), D = 1, delta = 0.01."""
        with torch.no_grad():
            for direction in self.x_proj:
                nn.init.kaiming_uniform_(direction, a=math.sqrt(5))
            self.dt_bias.fill_(START + math.log(-math.expm1(-START)))  # the inverse of softplus
            self.A_log.copy_(torch.arange(1, self.state + 1, device=self.A_log.device).log())
            self.D.fill_(1)

    def scan_map(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d) in float32 (float64 for float64)."""
        h, w, d = x.shape[1:]
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        A, D, bias = (p[:, None].expand(-1, h * w, *p.shape[1:]) for p in (A, self.D, self.dt_bias))
        channels = x.flatten(1, 2).mT.contiguous()  # (b, d, h * w)
        shared = torch.ones_like(D)[..., None]  # delta's projection: every pixel has the same
        y = scan2d(channels, self.summarise(x), shared, A, D, bias, self.order.table(1, d, x.device))
        return y.mT.unflatten(1, (h, w))

    def summarise(self, x: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, d, k, 1 + 2n): delta before the softplus, B and C of each channel and direction."""
        cells = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.grid).flatten(2)  # (b, d, grid * grid)
        return F.linear(cells, self.x_proj.flatten(0, 1)).unflatten(-1, self.x_proj.shape[:2])

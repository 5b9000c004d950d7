"""The Mamba-3 block (arXiv:2603.15569) along the routes of a 2D scan.

On a (1, l) grid with ``scan="raster"`` it is the published block for sequences (state-spaces/mamba, Apache-2.0) and
loads its weights. With several inputs per step the published operator turns states i and i + n / 2 together, this one
neighbours, as with one input: the same up to the order of the states.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.gated_norm import Gate
from vmamba.kernels.mamba3 import mamba3
from vmamba.mixers.heads import count_heads, init_step_bias
from vmamba.scans import Scan

EPS = 1e-5
WEAKEST = -1e-4  # decay rate A nearest to zero


def rate(a: Tensor) -> Tensor:
    """A = -(1 + a) for a >= 0 and -1 / (1 - a) below: smooth, negative, at most ``WEAKEST``."""
    return -torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0))).clamp(min=-WEAKEST)


@register_notrace_module
class Mamba3Mixer(nn.Module):
    """(b, h, w, c) -> (b, h, w, c): one projection gives all that the routes need; no convolution; routes are summed.

    Each route has its own B, C, dt, A, trapezoid share and angles; A depends on the pixel, and pairs of states rotate.

    Args:
        dim: channels c; the scan runs on d = expand * c channels.
        state: states n. expand: d / c.
        head_dim: channels p of a head.
        rank: inputs and outputs of a step: 1, or r for the multi-input form (MIMO).
        rotated: part of the states that rotates, from 0 to 1.
        norm: builds the output gate, ``norm(d, device=..., dtype=...)``, called with the map and the gate's map;
            ``GatedRMSNorm`` normalises there too.
        scan: a scan's name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.
        device, dtype: of the parameters.

    Raises:
        ValueError: d does not divide into heads, or ``rotated`` or ``rank`` is out of range.
    """

    official_keys = ()

    def __init__(
        self,
        dim: int,
        *,
        state: int = 64,
        expand: float = 2.0,
        head_dim: int = 32,
        rank: int = 1,
        rotated: float = 0.5,
        norm: Callable[..., nn.Module] = Gate,
        scan: "str | Callable" = "cross",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not 0 <= rotated <= 1 or rank < 1:
            raise ValueError(f"rotated must be from 0 to 1 and rank at least 1, got {rotated} and {rank}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scan, self.heads, self.rank = Scan(scan), count_heads(dim, expand, head_dim), rank
        self.inner, k, m = self.heads * head_dim, self.scan.count, self.heads
        self.widths = rank * state, rank * state, m, m, m, int(state * rotated / 2)  # B, C, dt, A, trap, angles
        self.in_proj = nn.Linear(dim, 2 * self.inner + k * sum(self.widths), bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(k, m, **dd))
        self.B_bias = nn.Parameter(torch.empty(k, m, rank, state, **dd))
        self.C_bias = nn.Parameter(torch.empty(k, m, rank, state, **dd))
        self.D = nn.Parameter(torch.empty(k, m, **dd))
        self.mimo_x, self.mimo_z, self.mimo_o = (
            nn.Parameter(torch.empty(m, rank, head_dim, **dd)) if rank > 1 else None for _ in range(3)
        )
        self.B_norm = nn.RMSNorm(state, EPS, **dd)
        self.C_norm = nn.RMSNorm(state, EPS, **dd)
        self.norm = norm(self.inner, **dd)
        self.out_proj = nn.Linear(self.inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Biases of B and C and D = 1, dt log-uniform in [1e-3, 0.1]; with r inputs, x and the outputs are averaged."""
        init_step_bias(self.dt_bias)
        values = {"B_bias": 1, "C_bias": 1, "D": 1, "mimo_x": 1 / self.rank, "mimo_z": 1, "mimo_o": 1 / self.rank}
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name in values:
                    parameter.fill_(values[name])

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        z, x, features = self.in_proj(x).tensor_split([self.inner, 2 * self.inner], -1)
        y = self.norm(self.scan_map(x, features), _streams(z, self.mimo_z))  # (b, h, w, r, d)
        y = y if self.mimo_o is None else y * _by_stream(self.mimo_o)
        return self.out_proj(y.sum(-2))

    def scan_map(self, x: Tensor, features: Tensor) -> Tensor:
        """x (b, h, w, d), what else each route reads (b, h, w, k ...) -> (b, h, w, r, d), float32 or wider."""
        (h, w), k = x.shape[1:3], self.scan.count
        wide = torch.promote_types(self.D.dtype, torch.float32)
        features = self.scan.split_each(features.unflatten(-1, (k, -1)))
        B, C, dt, a, trap, angles = features.split(self.widths, -1)  # (b, k, l, ...)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)[:, None])
        log_decay, dt, trap = (t.mT.flatten(1, 2) for t in (rate(a.to(wide)) * dt, dt, trap))  # (b, k m, l)
        k_maps = self._maps(self.B_norm, B, self.B_bias)
        q_maps = self._maps(self.C_norm, C, self.C_bias)
        angles = angles[:, :, None].expand(-1, -1, self.heads, -1, -1).flatten(1, 2)  # (b, k m, l, a)
        v = _streams(self.scan.split(x), self.mimo_x).unflatten(-1, (self.heads, -1))  # (b, k, l, r, m, p)
        v = v.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)  # (b, k m, l, r, p)
        y = cast(Tensor, mamba3(q_maps, k_maps, v, log_decay, dt, trap, angles))
        y = y + v * self.D.to(wide).view(-1, 1, 1, 1)
        y = y.unflatten(1, (k, -1)).permute(0, 1, 3, 4, 2, 5)  # (b, k, l, r, m, p)
        return self.scan.merge(y.flatten(3), h, w).unflatten(-1, (self.rank, -1))

    def _maps(self, norm: nn.Module, t: Tensor, bias: Tensor) -> Tensor:
        """B or C of the routes, (b, k, l, r n), normalised, with each head's bias: (b, k m, l, r, n)."""
        t = norm(t.unflatten(-1, (self.rank, -1)).to(bias.dtype))[:, :, None]
        return (t + bias[:, :, None]).flatten(1, 2)


def _streams(t: Tensor, weights: Tensor | None) -> Tensor:
    """(..., d) -> (..., r, d): each stream weighs the channels in its own way; weights (m, r, p), None for r = 1."""
    return t[..., None, :] if weights is None else t[..., None, :] * _by_stream(weights)


def _by_stream(weights: Tensor) -> Tensor:
    """(m, r, p) -> (r, d)"""
    return weights.transpose(0, 1).flatten(1)

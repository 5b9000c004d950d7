"""RMS normalisation together with a gate, as after the scans of Mamba-2, Mamba-3 and Gated DeltaNet."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5


class GatedRMSNorm(nn.Module):
    """rms(x silu(z)) w where the gate comes first (Mamba-2), or rms(x) w silu(z) (Gated DeltaNet).

    Computed in float32 (float64 for float64), returned in the weight's type.

    Args:
        channels: size c of the last axis.
        groups: equal parts of the channels, each divided by its own root mean square; 1 for all together.
        gate_first: whether the gate is applied before the norm.
        bias: add one to the normalised values, before a gate that comes after.
        device, dtype: of the parameters.

    Raises:
        ValueError: the channels do not divide into the groups.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int = 1,
        gate_first: bool = True,
        bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} groups")
        self.groups, self.gate_first = groups, gate_first
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x (..., c), gate z (..., c) or None for no gate -> (..., c)"""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        gate = 1 if z is None else F.silu(z.to(wide))
        y = x.to(wide) * gate if self.gate_first else x.to(wide)
        grouped = y.unflatten(-1, (self.groups, -1))
        y = F.rms_norm(grouped, grouped.shape[-1:], eps=EPS).flatten(-2) * self.weight
        y = y if self.bias is None else y + self.bias
        return (y if self.gate_first else y * gate).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Settings, for ``print(model)``."""
        return f"{self.weight.numel()}, groups={self.groups}, gate_first={self.gate_first}"


class Gate(nn.Module):
    """x silu(z) alone, without parameters, for a block whose scan needs no norm (Mamba-3).

    Args:
        channels: size c of the last axis. device, dtype: unused; they make it fit where a norm does.
    """

    def __init__(self, channels: int, *, device=None, dtype=None):
        super().__init__()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (..., c), gate z (..., c) -> (..., c) in z's type, computed in the wider of the two."""
        return (x * F.silu(z.to(torch.promote_types(x.dtype, z.dtype)))).to(z.dtype)

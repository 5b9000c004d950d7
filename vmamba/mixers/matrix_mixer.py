"""The matrix mixer (Hydra, arXiv:2407.09941, section 2): one block around any matrix that mixes tokens.

Attention, the mixers of state-space models, convolutions over all tokens, MLP-Mixer and Fourier mixing differ only in
the family of matrices M of y = M x. Here the family is an object of ``vmamba.mixers.matrices``, the rest is the same:

    z, x, f, s = W_in u     x, f = conv(x, f)     y = mix(silu(x), f, s)     output = W_out (rms_norm(y) silu(z))
"""

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.gated_norm import GatedRMSNorm
from vmamba.mixers.heads import count_heads
from vmamba.scans import Scan


class Matrix(nn.Module):
    """A family of matrices over l tokens; one matrix for each of the heads that the d channels are divided into.

    ``convolved`` and ``direct`` tell how many channels, f and s, it wants of the block's projection for each token,
    those behind the block's convolution and those that bypass it; they are what makes it depend on the data.

    Args:
        dim: channels d. heads: heads h, a divisor of d.
    """

    convolved: int = 0
    direct: int = 0

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.dim, self.heads = dim, heads

    def forward(self, x: Tensor, features: Tensor, steps: Tensor) -> Tensor:
        """Tokens (b, l, d), features (b, l, convolved) and (b, l, direct) -> mixed tokens (b, l, d)."""
        raise NotImplementedError


def check_length(length: int, limit: int) -> None:
    """Raises ValueError if a sequence of ``length`` tokens is longer than a fixed matrix, which is for ``limit``."""
    if length > limit:
        raise ValueError(f"the matrix is fixed for at most {limit} tokens, got {length}; make it with length={length}")


class Conv1d(nn.Conv1d):
    """A depthwise convolution along tokens that sees as far ahead as back, (b, l, c) -> (b, l, c).

    Args:
        channels: c. size: odd width of the filter.
        device, dtype: of the parameters.

    Raises:
        ValueError: the size is even.
    """

    def __init__(self, channels: int, size: int, *, device=None, dtype=None):
        if size % 2 == 0:
            raise ValueError(f"the convolution along tokens must have an odd size, got {size}")
        super().__init__(channels, channels, size, padding=size // 2, groups=channels, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(b, l, c) -> (b, l, c)"""
        return super().forward(input.mT).mT


@register_notrace_module
class MatrixMixer(nn.Module):
    """A token mixer on sequences (b, l, c) and on maps (b, h, w, c), which a scan reads as sequences.

    Each route of the scan is a sequence of its own; all have the same weights, and their results are summed pixel by
    pixel before the norm. A matrix that sees both sides of a token needs one route only, such as ``raster``.

    Args:
        dim: channels c.
        matrix: builds the matrix over d = expand * c channels, ``matrix(d, heads, device=..., dtype=...)``.
        expand: d / c.
        head_dim: channels of a head; one head has all of them where there are fewer.
        conv: size of the convolution along the tokens, odd.
        bias: whether the two projections have a bias.
        scan: the order in which maps are read: a name, ``"package.module"``, or a function ``routes(h, w) -> (k, l)``.

    Raises:
        ValueError: d is not a multiple of ``head_dim``, or ``conv`` is even.
    """

    official_keys: Sequence[tuple[str, str]] = (
        (r"(^|\.)matrix_mixer\.", r"\1matrix."),
        (r"matrix\.BC$", "matrix.BC.weight"),
        (r"(^|\.)conv1d\.", r"\1conv."),
    )

    def __init__(
        self,
        dim: int,
        *,
        matrix: Callable[..., Matrix],
        expand: float = 2.0,
        head_dim: int = 128,
        conv: int = 7,
        bias: bool = False,
        scan: "str | Callable" = "raster",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.scan = Scan(scan)
        self.matrix = matrix(inner, count_heads(dim, expand, min(head_dim, inner)), **dd)
        mixed = inner + self.matrix.convolved
        self.widths = inner, mixed, self.matrix.direct
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=bias, **dd)
        self.conv = Conv1d(mixed, conv, **dd)
        self.norm = GatedRMSNorm(inner, gate_first=False, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, c) -> (b, l, c), or (b, h, w, c) -> (b, h, w, c)"""
        gate, mixed, steps = self.in_proj(x).split(self.widths, -1)
        y = self._mix(mixed, steps) if x.ndim == 3 else self._mix_map(mixed, steps)
        return self.out_proj(self.norm(y, gate))

    def _mix(self, mixed: Tensor, steps: Tensor) -> Tensor:
        """(b, l, d + convolved), (b, l, direct) -> (b, l, d)"""
        x, features = self.conv(mixed).split([self.matrix.dim, self.matrix.convolved], -1)
        return self.matrix(F.silu(x), features, steps)

    def _mix_map(self, mixed: Tensor, steps: Tensor) -> Tensor:
        """(b, h, w, d + convolved), (b, h, w, direct) -> (b, h, w, d)"""
        h, w = mixed.shape[1:3]
        routes = [self.scan.split(t).flatten(0, 1) for t in (mixed, steps)]  # (b k, l, ...)
        y = self._mix(*routes).unflatten(0, (-1, self.scan.count))
        return self.scan.merge(y, h, w)

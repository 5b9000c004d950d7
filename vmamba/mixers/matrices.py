"""Families of mixing matrices for ``MatrixMixer`` (arXiv:2407.09941, section 2 and appendix A); T is the length l.

    family                        of the data            fixed                   M[t, s]
    dense                                                Dense                   free
    Toeplitz                      Toeplitz               FixedToeplitz           a function of t - s
    Vandermonde                   Vandermonde            Fourier                 cosines of t times s
    Cauchy                        Cauchy                 FixedCauchy             1 / (q_t + k_s)
    low rank (linear attention)   LowRank                FixedLowRank            q_t . k_s
    attention                     Attention              FixedAttention          softmax over s of q_t . k_s
    quasiseparable                hydra.Quasiseparable   hydra.FixedQuasiseparable

All return x + c M x with a c that keeps the scale of x. A fixed matrix is made for ``length`` tokens; of a shorter
sequence it mixes the first positions. Original code: goombalab/hydra, MIT.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.mixers.matrix_mixer import Matrix, check_length


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, l, h * p) -> (b, h, l, p)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(b, h, l, p) -> (b, l, h * p)"""
    return x.transpose(1, 2).flatten(2)


class Dense(Matrix):
    """A parameter for every pair of positions, as in MLP-Mixer; c = T^-1/2.

    Args:
        dim: channels d. heads: heads h.
        length: tokens T at most.
    """

    def __init__(self, dim: int, heads: int, *, length: int, device=None, dtype=None):
        super().__init__(dim, heads)
        self.M = nn.Parameter(torch.empty(heads, length, length, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal."""
        nn.init.normal_(self.M)

    def forward(self, x: Tensor, features: Tensor, steps: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)"""
        length, limit = x.shape[1], self.M.shape[-1]
        check_length(length, limit)
        return x + limit**-0.5 * join_heads(self.M[:, :length, :length] @ split_heads(x, self.heads))


class Fourier(Matrix):
    """The real part of the discrete Fourier transform, M[t, s] = cos(2 pi t s / T), as in FNet; c = T^-1/2.

    Args:
        dim: channels d. heads: heads h, which all have the same matrix.
        length: tokens T at most.
    """

    dft_matrix: Tensor

    def __init__(self, dim: int, heads: int, *, length: int, device=None, dtype=None):
        super().__init__(dim, heads)
        self.register_buffer("dft_matrix", torch.empty(length, length, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The table of cosines, from exact multiples of 2 pi / T."""
        length = self.dft_matrix.shape[0]
        t = torch.arange(length, device=self.dft_matrix.device)
        turns = (t[:, None] * t % length).double() / length
        self.dft_matrix.copy_(torch.cos(2 * math.pi * turns))

    def forward(self, x: Tensor, features: Tensor, steps: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)"""
        length, limit = x.shape[1], self.dft_matrix.shape[0]
        check_length(length, limit)
        return x + limit**-0.5 * (self.dft_matrix[:length, :length] @ x)


def toeplitz(x: Tensor, taps: Tensor) -> Tensor:
    """x (b, h, l, p) convolved over all tokens by FFT, y[t] = sum over s of taps[t - s + 1] x[s].

    ``taps`` (b or 1, h, 2l - 1) belong to t - s = -(l - 1), ..., l - 1. As in the original code they act one step
    ahead, and wrap around: what is taps[l] for the last token and the first is taps[-(l - 1)].
    """
    length, size = x.shape[2], taps.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    padded = F.pad(x.to(wide), (0, 0, length - 1, 0))
    spectrum = torch.fft.rfft(padded, dim=2) * torch.fft.rfft(taps.to(wide), dim=2)[..., None]
    return torch.fft.irfft(spectrum, n=size, dim=2)[:, :, :length]


class Toeplitz(Matrix):
    """A convolution over all tokens, whose taps t and -t are made from token t; c = T^-1/2 / 2.

    Args:
        dim: channels d. heads: heads h.
        length: tokens T that c is made for; those of the input by default.
    """

    def __init__(self, dim: int, heads: int, *, length: int | None = None, device=None, dtype=None):
        super().__init__(dim, heads)
        self.length, self.convolved = length, 2 * heads

    def forward(self, x: Tensor, features: Tensor, steps: Tensor) -> Tensor:
        """(b, l, d), (b, l, 2h) -> (b, l, d)"""
        ahead, back = F.silu(features).mT.chunk(2, 1)  # (b, h, l) each
        y = toeplitz(split_heads(x, self.heads), torch.cat([back[..., 1:].flip(-1), ahead], -1))
        return x + 0.5 * (self.length or x.shape[1]) ** -0.5 * join_heads(y)


class FixedToeplitz(Matrix):
    """A convolution over all tokens with a parameter for each of its 2 T - 1 taps; c = T^-1/2 / 2.

    Args:
        dim: channels d. heads: heads h.
        length: tokens T at most.
    """

    def __init__(self, dim: int, heads: int, *, length: int, device=None, dtype=None):
        super().__init__(dim, heads)
        self.length = length
        self.conv_params = nn.Parameter(torch.empty(heads, 2 * length - 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal."""
        nn.init.normal_(self.conv_params)

    def forward(self, x: Tensor, features: Tensor, steps: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)"""
        unused = self.length - x.shape[1]
        check_length(x.shape[1], self.length)
        taps = self.conv_params[None, :, unused : 2 * self.length - 1 - unused]
        return x + 0.5 * self.length**-0.5 * join_heads(toeplitz(split_heads(x, self.heads), taps))


class QueryKey(Matrix):
    """A matrix of a query q_t and a key k_s, r numbers for each token and head; c = (T r)^-1/2.

    Args:
        dim: channels d. heads: heads h.
        rank: numbers r of a query and of a key.
        length: tokens T that c is made for; those of the input by default.
    """

    def __init__(self, dim: int, heads: int, *, rank: int = 16, length: int | None = None, device=None, dtype=None):
        super().__init__(dim, heads)
        self.rank, self.length = rank, length
        self.convolved = 2 * heads * rank

    def activate(self, features: Tensor) -> Tensor:
        """The features as queries and keys; most families take them as they are."""
        return features

    def pairs(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, 2hr) -> queries and keys, (b, h, l, r) each"""
        q, k = self.activate(features).unflatten(-1, (2, self.heads, self.rank)).permute(2, 0, 3, 1, 4)
        return q, k

    def scale(self, length: int) -> float:
        """The factor c for ``length`` tokens."""
        return ((self.length or length) * self.rank) ** -0.5

    def product(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """q and k (b, h, l, r), x (b, h, l, p) -> M x (b, h, l, p)"""
        raise NotImplementedError

    def forward(self, x: Tensor, features: Tensor, steps: Tensor) -> Tensor:
        """(b, l, d), (b, l, convolved) -> (b, l, d)"""
        q, k = self.pairs(features)
        return x + self.scale(x.shape[1]) * join_heads(self.product(q, k, split_heads(x, self.heads)))


class Fixed(QueryKey):
    """Queries and keys that are parameters of the position: put before a family, it takes its data dependence away.

    Args:
        dim: channels d. heads: heads h.
        length: tokens T at most.
        rank: numbers r of a query and of a key.
    """

    def __init__(self, dim: int, heads: int, *, length: int, rank: int = 16, device=None, dtype=None):
        super().__init__(dim, heads, rank=rank, length=length)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.convolved, self.limit = 0, length
        self.q_matrix = nn.Parameter(torch.empty(length, heads, rank, **dd))
        self.k_matrix = nn.Parameter(torch.empty(length, heads, rank, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal."""
        nn.init.normal_(self.q_matrix)
        nn.init.normal_(self.k_matrix)

    def pairs(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, 0) -> queries and keys, (b, h, l, r) each"""
        batch, length = features.shape[:2]
        check_length(length, self.limit)
        q, k = (t[:length].transpose(0, 1).expand(batch, -1, -1, -1) for t in (self.q_matrix, self.k_matrix))
        return q, k


class Vandermonde(QueryKey):
    """M[t, s] = sum over r of cos(2 pi e q_t s) - cos(2 pi e k_s t), e = 1e-3; c = (2 T r)^-1/2."""

    def scale(self, length: int) -> float:
        """The factor c for ``length`` tokens."""
        return 2**-0.5 * super().scale(length)

    def product(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """q and k (b, h, l, r), x (b, h, l, p) -> M x (b, h, l, p), float32 at least"""
        wide = torch.promote_types(x.dtype, torch.float32)
        position = torch.arange(x.shape[2], device=x.device, dtype=wide)[:, None] * (2e-3 * math.pi)
        of_query, of_key = (torch.cos(f[..., None, :] * position).sum(-1) for f in (q.to(wide), k.to(wide)))
        return (of_query - of_key.mT) @ x.to(wide)


def cauchy(q: Tensor, k: Tensor, x: Tensor, offset: "Tensor | float") -> Tensor:
    """M x in float32 at least, M[t, s] = sum over r of 1 / (e^q_t + e^k_s + ``offset``)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    nodes = q.to(wide).exp()[..., :, None, :] + k.to(wide).exp()[..., None, :, :]  # (b, h, t, s, r)
    return (1 / (nodes + offset)).sum(-1) @ x.to(wide)


class Cauchy(QueryKey):
    """M[t, s] = sum over r of 1 / (e^q_t + e^k_s + 2 bias + 1e-8), with a learned scalar bias."""

    def __init__(self, dim: int, heads: int, *, rank: int = 16, length: int | None = None, device=None, dtype=None):
        super().__init__(dim, heads, rank=rank, length=length)
        self.bias = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """bias = 1/2"""
        nn.init.constant_(self.bias, 0.5)

    def product(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """q and k (b, h, l, r), x (b, h, l, p) -> M x (b, h, l, p), float32 at least"""
        return cauchy(q, k, x, 2 * self.bias + 1e-8)


class FixedCauchy(Fixed):
    """M[t, s] = sum over r of 1 / (e^q_t + e^k_s + 1e-8), with learned q and k of each position."""

    def product(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """q and k (b, h, l, r), x (b, h, l, p) -> M x (b, h, l, p), float32 at least"""
        return cauchy(q, k, x, 1e-8)


class LowRank(QueryKey):
    """M[t, s] = q_t . k_s with q, k = silu(features): linear attention, in time linear in the tokens."""

    def activate(self, features: Tensor) -> Tensor:
        """silu"""
        return F.silu(features)

    def product(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """q and k (b, h, l, r), x (b, h, l, p) -> M x (b, h, l, p)"""
        return q @ (k.mT @ x)


class FixedLowRank(Fixed, LowRank):
    """M[t, s] = q_t . k_s with learned q and k of each position."""


class Attention(QueryKey):
    """M[t, s] = softmax over s of q_t . k_s r^-1/2; c = 1."""

    def scale(self, length: int) -> float:
        """1: the rows of M sum up to one."""
        return 1.0

    def product(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """q and k (b, h, l, r), x (b, h, l, p) -> M x (b, h, l, p)"""
        return F.scaled_dot_product_attention(q, k, x)


class FixedAttention(Fixed, Attention):
    """Attention with learned q and k of each position.

    The original contracts its parameters (T, h, r) as if they were (h, T, r), so it runs for T = h alone; these are
    the products that were meant.
    """

"""Two-dimensional discrete wavelet transform of channels-last maps with PyWavelets' filters, and its exact inverse.

One level along an axis of even length n, with filters of length L, p = L / 2 - 1 and indices modulo n (Mallat 1989)::

    low[m]  = sum over j of dec_lo[L - 1 - j] x[2m + j - p]
    high[m] = sum over j of dec_hi[L - 1 - j] x[2m + j - p]
    x[i]    = sum over m of rec_lo[i + p - 2m] low[m] + rec_hi[i + p - 2m] high[m]

This is ``mode="periodization"`` of PyWavelets. An odd side gets a row or column of zeros, which the inverse cuts off.
Filters are split into even and odd taps, so that no product is wasted; they are plain numbers, exact in every dtype.
"""

from collections.abc import Sequence
from typing import Any

import pywt
import torch
from torch import Tensor
from torch.nn import functional as F

Taps = list[tuple[int, list[tuple[float, float]]]]  # shift, 2 x 2 matrix


class Wavelet:
    """A wavelet's analysis and synthesis of maps, one level at a time.

    >>> haar = Wavelet("haar")
    >>> bands = haar.analyse(torch.ones(1, 5, 8, 3))
    >>> bands.shape, haar.synthesise(bands, 5, 8).shape
    (torch.Size([1, 3, 4, 3, 4]), torch.Size([1, 5, 8, 3]))

    Args:
        wavelet: a name from ``pywt.wavelist(kind="discrete")`` or a ``pywt.Wavelet``.

    Raises:
        ValueError: PyWavelets knows no such discrete wavelet.
    """

    def __init__(self, wavelet: str | Any = "haar"):
        bank: Any = pywt.Wavelet(wavelet) if isinstance(wavelet, str) else wavelet  # pyright: ignore[reportAttributeAccessIssue]
        self.name = bank.name
        analysis = _polyphase(bank.dec_lo[::-1], bank.dec_hi[::-1])
        synthesis = _polyphase(bank.rec_lo, bank.rec_hi)
        self._analysis: Taps = [(-t, taps) for t, taps in analysis]  # bands from phases
        self._synthesis: Taps = [(t, list(zip(*taps, strict=True))) for t, taps in synthesis]  # phases from bands

    def __repr__(self) -> str:
        return f"Wavelet({self.name!r})"

    def analyse(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, ceil(h / 2), ceil(w / 2), c, 4), floating point.

        The bands: low in both directions; differences along y alone, along x alone, in both.
        """
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        for axis in (2, 1):
            even_odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
            x = torch.stack(_filtered(even_odd, self._analysis, axis), -1)  # (b, h, w', c, 2); (b, h', w', c, 2, 2)
        return x.flatten(-2)

    def synthesise(self, bands: Tensor, h: int, w: int) -> Tensor:
        """(b, ceil(h / 2), ceil(w / 2), c, 4) -> (b, h, w, c): the inverse of :meth:`analyse` for that size."""
        x = bands.unflatten(-1, (2, 2))
        for axis in (1, 2):
            low_high = x.unbind(-1)
            x = torch.stack(_filtered(low_high, self._synthesis, axis), axis + 1).flatten(axis, axis + 1)
        return x[:, :h, :w]


def _polyphase(low: Sequence[float], high: Sequence[float]) -> Taps:
    """Taps 2t + p and 2t + p + 1 of both filters for every t, with p = L / 2 - 1."""
    p = len(low) // 2 - 1
    shifts = range(-((p + 1) // 2), (len(low) - p + 1) // 2)

    def tap(band: Sequence[float], j: int) -> float:
        return band[j] if 0 <= j < len(band) else 0.0

    return [(t, [(tap(band, 2 * t + p), tap(band, 2 * t + p + 1)) for band in (low, high)]) for t in shifts]


def _filtered(pair: Sequence[Tensor], taps: Taps, axis: int) -> list[Tensor]:
    """Two sums, over shifts and both tensors of ``pair``, of taps times tensors shifted round along ``axis``."""
    sums: list[Any] = [None, None]
    for shift, matrix in taps:
        shifted = [x.roll(shift, axis) if shift else x for x in pair]
        for i, row in enumerate(matrix):
            for tap, x in zip(row, shifted, strict=True):
                if tap:
                    sums[i] = x * tap if sums[i] is None else torch.add(sums[i], x, alpha=tap)
    return sums

"""The wavelet transform: PyWavelets' numbers, an exact inverse for every wavelet on any size, every dtype."""

import numpy as np
import pytest
import pywt
import torch

from tests import goldens
from vmamba.wavelet import Wavelet

NAMES = pywt.wavelist(kind="discrete")
EXACT = [name for name in NAMES if name != "dmey"]  # Meyer's filters are cut off: their inverse is not exact
SIZES = [(1, 1), (1, 7), (5, 8), (17, 6)]


def mapped(h, w, c=3, dtype=torch.float64):
    return torch.randn(2, h, w, c, dtype=dtype, generator=torch.Generator().manual_seed(0))


def test_all_wavelets_are_tested():
    assert len(NAMES) > 100 and {"haar", "db2", "sym8", "coif3", "bior4.4", "rbio3.1", "dmey"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_like_pywavelets(name):
    x = mapped(6, 14, 1)
    ours = Wavelet(name).analyse(x)
    low, details = pywt.dwt2(x[..., 0].numpy(), name, mode="periodization", axes=(1, 2))
    torch.testing.assert_close(ours[..., 0, :], torch.tensor(np.stack([low, *details], -1)), rtol=0, atol=1e-12)
    back = pywt.idwt2((low, details), name, mode="periodization", axes=(1, 2))
    torch.testing.assert_close(Wavelet(name).synthesise(ours, 6, 14)[..., 0], torch.tensor(back), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_exact_inverse(name):
    wavelet = Wavelet(name)
    for h, w in SIZES:
        x = mapped(h, w)
        bands = wavelet.analyse(x)
        assert bands.shape == (2, (h + 1) // 2, (w + 1) // 2, 3, 4)
        torch.testing.assert_close(wavelet.synthesise(bands, h, w), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("name", ["haar", "db3", "bior2.4"])
def test_exact_inverse_of_levels(name, levels):
    wavelet, x = Wavelet(name), mapped(13, 22)
    stack, low = [], x
    for _ in range(levels):
        size = low.shape[1:3]
        bands = wavelet.analyse(low)
        stack.append((bands[..., 1:], size))
        low = bands[..., 0]
    for high, (h, w) in reversed(stack):
        low = wavelet.synthesise(torch.cat([low[..., None], high], -1), h, w)
    torch.testing.assert_close(low, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["haar", "db4", "sym5", "coif2"])
def test_orthogonal_wavelets_keep_the_norm(name):
    wavelet, x, y = Wavelet(name), mapped(8, 12), mapped(8, 12).flip(1)
    assert wavelet.analyse(x).square().sum() == pytest.approx(x.square().sum().item())
    bands = wavelet.analyse(y)
    assert (wavelet.analyse(x) * bands).sum() == pytest.approx((x * wavelet.synthesise(bands, 8, 12)).sum().item())


@pytest.mark.parametrize("case", goldens.load("op_mobilemamba_mixer")["cases"], ids=["odd", "even"])
def test_golden(case):
    (x,) = goldens.case_inputs(case)
    bands = Wavelet("db1").analyse(x.permute(0, 2, 3, 1)[..., :16])
    assert goldens.compare(bands.permute(0, 3, 4, 1, 2), case["outputs"]["dwt"]) < 1e-12


def test_own_filters():
    half = [0.5**0.5, 0.5**0.5]
    bank = pywt.Wavelet("mine", filter_bank=(half, [-half[0], half[0]], half, [half[0], -half[0]]))
    x = mapped(5, 4)
    assert repr(Wavelet(bank)) == "Wavelet('mine')"
    torch.testing.assert_close(Wavelet(bank).analyse(x), Wavelet("haar").analyse(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_strides(dtype):
    x = mapped(7, 9, 6, dtype).permute(0, 2, 1, 3)[..., 1:4]
    wavelet = Wavelet("db2")
    bands = wavelet.analyse(x)
    assert bands.dtype == dtype
    torch.testing.assert_close(wavelet.synthesise(bands, 9, 7), x, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_gradient():
    wavelet, x = Wavelet("db2"), mapped(3, 5, 1).requires_grad_()
    assert torch.autograd.gradcheck(wavelet.analyse, x)
    bands = wavelet.analyse(x.detach()).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: wavelet.synthesise(b, 3, 5), bands)


@pytest.mark.parametrize("name", ["dbx", "gaus1"])
def test_unknown_wavelet(name):
    with pytest.raises(ValueError, match=name):
        Wavelet(name)

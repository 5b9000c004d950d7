"""Every family of mixing matrices against the original, against its definition, and in the block on maps."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from tests import goldens
from tests.test_hydra import check_golden
from vmamba.mixers import matrices
from vmamba.mixers.hydra import FixedQuasiseparable, Quasiseparable
from vmamba.mixers.matrix_mixer import MatrixMixer

T, HEADS, RANK = 12, 4, 4
OF_DATA = {
    "toeplitz": partial(matrices.Toeplitz, length=T),
    "vandermonde": partial(matrices.Vandermonde, rank=RANK, length=T),
    "cauchy": partial(matrices.Cauchy, rank=RANK, length=T),
    "low_rank": partial(matrices.LowRank, rank=RANK, length=T),
    "attention": partial(matrices.Attention, rank=RANK),
    "quasiseparable": partial(Quasiseparable, state=HEADS * RANK, shared=True),
}
FIXED = {
    "dense": partial(matrices.Dense, length=T),
    "toeplitz": partial(matrices.FixedToeplitz, length=T),
    "vandermonde": partial(matrices.Fourier, length=T),
    "cauchy": partial(matrices.FixedCauchy, rank=RANK, length=T),
    "low_rank": partial(matrices.FixedLowRank, rank=RANK, length=T),
    "quasiseparable": partial(FixedQuasiseparable, length=T, state=HEADS * RANK),
}
GOLDEN = {f"{name}_dd": matrix for name, matrix in OF_DATA.items()}
GOLDEN |= {f"{name}_di": matrix for name, matrix in FIXED.items()}
ALL = {**GOLDEN, "attention_di": partial(matrices.FixedAttention, rank=RANK, length=T)}


def test_every_golden_is_covered():
    assert {f"op_matrix_mixer_{name}" for name in GOLDEN} == set(goldens.names("op_matrix_mixer_*"))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    golden = goldens.load(f"op_matrix_mixer_{name}")
    config = golden["config"]
    assert (config["max_seq_len"], config["qk_dim"]) == (T, RANK)
    block = MatrixMixer(config["d_model"], matrix=GOLDEN[name], head_dim=config["headdim"], conv=config["d_conv"])
    check_golden(block, golden)


def small(name, **options):
    torch.manual_seed(0)
    return MatrixMixer(16, matrix=ALL[name], **{"head_dim": 8, "conv": 3, **options})


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (2, 5)])
def test_trains_on_any_grid(name, grid):
    module = small(name, scan="cross")
    x = torch.randn(2, *grid, 16, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert y.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *module.parameters()])


@pytest.mark.parametrize("name", FIXED)
def test_fixed_matrices_have_a_length(name):
    with pytest.raises(ValueError, match="fixed for at most 12 tokens, got 13"):
        small(f"{name}_di")(torch.randn(1, 13, 16))


def product(name, **options):
    """A matrix over 8 channels and 2 heads in float64, and the features that it wants of six tokens."""
    torch.manual_seed(0)
    matrix = getattr(matrices, name)(8, 2, **options).double()
    return matrix, torch.randn(1, 6, matrix.convolved).double()


def as_matrices(matrix, features):
    """The (h, l, l) matrices c M that ``matrix`` multiplies by, found from unit vectors."""
    length, width = features.shape[1], matrix.dim // matrix.heads
    units = torch.eye(length).double().repeat_interleave(matrix.dim, 1).view(length, length, matrix.dim)
    y = matrix(units, features.expand(length, -1, -1), units[..., :0]) - units  # (unit s, t, d)
    return y.permute(2, 1, 0)[::width]


def test_fourier():
    matrix, none = product("Fourier", length=6)
    expected = torch.fft.fft(torch.eye(6).double()).real * 6**-0.5
    torch.testing.assert_close(as_matrices(matrix, none), expected.expand(2, 6, 6))


@pytest.mark.parametrize("name", ["Vandermonde", "Cauchy", "LowRank", "Attention"])
def test_query_key_matrices_are_their_definitions(name):
    matrix, features = product(name, rank=3)
    q, k = features.unflatten(-1, (2, 2, 3))[0].unbind(1)  # (l, h, r)
    t = torch.arange(6).double()
    cosines = [torch.cos(2e-3 * torch.pi * torch.einsum("thr,s->thrs", f, t)).sum(2) for f in (q, k)]
    expected = {
        "Vandermonde": 36**-0.5 * (cosines[0].transpose(0, 1) - cosines[1].permute(1, 2, 0)),
        "Cauchy": 18**-0.5 * (1 / (q.exp()[:, None] + k.exp() + 1 + 1e-8)).sum(-1).permute(2, 0, 1),
        "LowRank": 18**-0.5 * torch.einsum("thr,shr->hts", F.silu(q), F.silu(k)),
        "Attention": torch.einsum("thr,shr->hts", q, k).mul(3**-0.5).softmax(-1),
    }
    torch.testing.assert_close(as_matrices(matrix, features), expected[name])


def test_toeplitz_matrices_are_constant_along_diagonals():
    of_data, features = product("Toeplitz")
    fixed, none = product("FixedToeplitz", length=6)
    for found, scale in ((as_matrices(of_data, features), 24**-0.5), (as_matrices(fixed, none), 24**-0.5)):
        for offset in range(-4, 5):  # the corner t = 5, s = 0 wraps around
            diagonal = found.diagonal(offset, 1, 2)
            torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal))
        assert found.abs().max() > 0.1 * scale
    taps = F.silu(features)[0].T  # (2h, l): ahead, then back
    torch.testing.assert_close(as_matrices(of_data, features)[:, 1, 0], 24**-0.5 * taps[:2, 2])
    torch.testing.assert_close(as_matrices(of_data, features)[:, 0, 3], 24**-0.5 * taps[2:, 2])


def test_a_short_sequence_meets_the_first_positions():
    whole, none = product("FixedLowRank", length=6, rank=3)
    first = as_matrices(whole, none)[:, :4, :4]
    torch.testing.assert_close(as_matrices(whole, none[:, :4]), first)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_every_type(name, dtype):
    x = torch.randn(2, 3, 4, 16)
    module, x = small(name).to(dtype), x.to(dtype)
    y, exact = module(x), module.double()(x.double())
    assert y.dtype == dtype and {t.dtype for t in small(name, dtype=dtype).state_dict().values()} == {dtype}
    assert (y - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_compile_without_graph_breaks(name):
    module, x = small(name), torch.randn(2, 3, 4, 16)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    torch.compiler.reset()


@pytest.mark.parametrize("name", ALL)
def test_initialisation_after_meta(name):
    fresh, module = small(name), small(name, device="meta").to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.fill_(torch.nan)
    for part in module.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    for (key, tensor), expected in zip(module.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert tensor.isfinite().all(), key
        assert expected.numel() < 64 or tensor.std() == pytest.approx(expected.std().item(), rel=0.3), key

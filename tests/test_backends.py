"""Which backend runs: precedence of the choices, and that an explicit one works or raises with a reason."""

import pytest
import torch

import vmamba
from vmamba.kernels import backends
from vmamba.kernels.causal_conv1d import causal_conv1d
from vmamba.kernels.route_conv import route_conv
from vmamba.kernels.routes import gather
from vmamba.kernels.selective_scan import selective_scan
from vmamba.scans import Scan


def scan(**options):
    torch.manual_seed(0)
    u, delta = torch.randn(1, 2, 5), torch.rand(1, 2, 5)
    return selective_scan(u, delta, -torch.rand(2, 3), torch.randn(1, 3, 5), torch.randn(1, 3, 5), **options)


def chosen(requested=""):
    return backends.choose("selective_scan", requested, torch.zeros(1)).__name__.rsplit("_", 1)[-1]


def test_automatic_choice_asks_the_tensor():
    assert chosen() == "cpu"


def test_precedence(monkeypatch):
    monkeypatch.setattr(backends, "_environment", "reference")
    assert chosen() == "reference"
    with vmamba.use_backend("cpu"):
        assert chosen() == "cpu"
        with vmamba.use_backend("reference"):
            assert chosen() == "reference"
            assert chosen("cpu") == "cpu"
        assert chosen() == "cpu"
    assert chosen() == "reference"


def test_backends_agree():
    assert torch.allclose(scan(backend="reference"), scan(backend="cpu"), atol=1e-6)


def test_explicit_choice_never_falls_back():
    with pytest.raises(RuntimeError, match=r"'triton' cannot run here: .*cuda.*; these can: cpu, reference"):
        scan(backend="triton")
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run here: it needs tensors on cuda"):
        scan(backend="cuda")
    with pytest.raises(RuntimeError, match="causal_conv1d has no 'cuda' implementation"):
        causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(2, 2), backend="cuda")


@pytest.mark.parametrize("use", [lambda: scan(backend="cup"), lambda: vmamba.use_backend("cup").__enter__()])
def test_unknown_backend(use):
    with pytest.raises(ValueError, match="unknown backend 'cup'; choose from cuda, triton, cpu, reference"):
        use()


def test_a_missing_package_is_a_reason(monkeypatch):
    def missing(name):
        raise ImportError(name="numba")

    monkeypatch.setattr(backends, "import_module", missing)
    monkeypatch.setattr(backends, "_module", backends._module.__wrapped__)  # without the modules it has seen
    assert backends.why_not("selective_scan", "cpu", torch.zeros(1)) == "numba is not installed"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"A": (3, 3)}, r"A must be \(2, 3\)"),
        ({"B": (1, 4, 5)}, "B must be"),
        ({"C": (2, 3, 5)}, "C must be"),
        ({"D": (3,)}, r"D must be \(2,\)"),
        ({"z": (1, 2, 4)}, "z must be"),
        ({"delta": (1, 3, 5)}, "delta must be"),
        ({"delta_bias": (5,)}, "delta_bias must be"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = {"u": (1, 2, 5), "delta": (1, 2, 5), "A": (2, 3), "B": (1, 3, 5), "C": (1, 3, 5)} | change
    with pytest.raises(ValueError, match=message):
        selective_scan(**{name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("name", ["cpu", "reference", "cuda"])
def test_an_operator_without_the_backend_asked_for_chooses_by_itself(name):
    x, table = torch.randn(1, 6, 4), Scan("bidirectional").table(2, 3)
    weight, bias = torch.randn(2, 4, 3), torch.randn(2, 4)
    with vmamba.use_backend(name):
        assert torch.equal(gather(x, table), x[:, table.routes])
        if name != "cuda":
            assert route_conv(x, weight, bias, table).shape == (1, 2, 6, 4)

"""The MLP on a CPU: bias and GELU as part of the products, wherever nothing else is asked for."""

import pytest
import torch
from torch import nn

from vmamba import mlp as module
from vmamba.mlp import Mlp

needs_onednn = pytest.mark.skipif(module.ONEDNN is None, reason="PyTorch was built without oneDNN")


def fused(mlp, x):
    """Whether oneDNN's products were called."""
    with torch.profiler.profile() as profile:
        mlp(x)
    return any("_linear_pointwise" in event.key for event in profile.key_averages())


@needs_onednn
@pytest.mark.parametrize("shape", [(2, 5, 7, 24), (3, 24), (0, 24), (1, 1, 24)], ids=str)
def test_the_same_values(shape, monkeypatch):
    torch.manual_seed(0)
    mlp, x = Mlp(24, 56), torch.randn(shape)
    with torch.no_grad():
        y = mlp(x)
        assert fused(mlp, x)
        strided = mlp(torch.cat([x, x], -1)[..., :24])
        monkeypatch.setattr(module, "ONEDNN", None)
        assert torch.allclose(y, mlp(x), atol=1e-6) and torch.allclose(strided, mlp(x), atol=1e-6)


@needs_onednn
def test_where_it_is_left_to_the_layers():
    x = torch.randn(3, 8)
    assert not fused(Mlp(8, 16), x)  # gradients
    with torch.no_grad():
        for other in (
            Mlp(8, 16, act_layer=nn.ReLU),
            Mlp(8, 16, act_layer=lambda: nn.GELU("tanh")),
            Mlp(8, 16, bias=False),
            Mlp(8, 16, norm_layer=nn.LayerNorm),
        ):
            assert not fused(other, x)
        assert not fused(Mlp(8, 16).double(), x.double())
        for name in ("fc1", "act", "fc2"):
            mlp, seen = Mlp(8, 16), []
            mlp.get_submodule(name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
            mlp(x)
            assert seen
        with torch.autocast("cpu", torch.bfloat16):
            assert not fused(Mlp(8, 16), x)


def test_compiled_and_traced():
    mlp, x = Mlp(8, 16), torch.randn(3, 8)
    with torch.no_grad():
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        traced = torch.jit.trace(mlp, x), torch.fx.symbolic_trace(mlp), torch.export.export(mlp, (x,)).module()
        for other in (compiled, *traced):
            assert torch.allclose(other(x), mlp(x), atol=1e-6)

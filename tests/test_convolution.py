"""Convolutions of channels-last maps: PyTorch's, or a product of patches where the weights outweigh the map."""

import pytest
import torch
from torch.nn import functional as F

from vmamba import block
from vmamba.block import Conv2d

CASES = [  # map, channels, kernel, stride, padding, dilation, and whether the weights outweigh it
    ((1, 7, 5), 64, 3, 2, 1, 1, True),
    ((2, 4, 3), 96, (3, 2), (2, 1), (1, 0), 1, True),
    ((1, 6, 6), 64, 3, 2, 2, 2, True),
    ((1, 1, 1), 8, 3, 2, 1, 1, True),
    ((1, 9, 9), 32, 3, 2, 1, 1, False),
    ((1, 3, 3), 64, 1, 1, 0, 1, False),  # nothing would have to be laid out anew
    ((0, 7, 5), 64, 3, 2, 1, 1, False),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid, channels, kernel, stride, padding, dilation, outweighs", CASES)
def test_same_as_pytorchs(grid, channels, kernel, stride, padding, dilation, outweighs, bias):
    torch.manual_seed(0)
    conv = Conv2d(5, channels, kernel, stride, padding, dilation, bias=bias).double()
    x = torch.randn(*grid, 5, dtype=torch.float64)
    right = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, stride, padding, dilation).permute(0, 2, 3, 1)
    assert conv._outweighs(x) is outweighs
    with torch.no_grad():
        assert torch.allclose(conv(x), right, rtol=0, atol=1e-14) and conv(x).shape == right.shape
        kept = conv.weight.detach().clone()
        conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
        assert torch.allclose(conv(x), right, rtol=0, atol=1e-14) and torch.equal(conv.weight, kept)
    assert torch.allclose(conv(x), right, rtol=0, atol=1e-14)  # with gradients
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert conv.float()(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"groups": 5}, {"padding_mode": "reflect"}, {"padding": "valid"}], ids=str)
def test_others_are_pytorchs(options):
    conv = Conv2d(5, 60, 3, **{"padding": 1, **options})
    assert not conv._outweighs(torch.randn(1, 4, 4, 5))
    with torch.no_grad():
        assert conv(torch.randn(1, 4, 4, 5)).shape[-1] == 60


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_for_small_maps_on_a_gpu(device, monkeypatch):
    torch.manual_seed(0)
    conv, x = Conv2d(5, 16, 3, 2, 1).to(device), torch.randn(2, 9, 7, 5, device=device)
    if device == "cpu":
        monkeypatch.setattr(block, "inlines", lambda x: not torch.is_grad_enabled())
    operators = []

    def backend(graph, inputs):
        operators.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled, expected = torch.compile(conv, backend=backend, fullgraph=True), conv(x)
    with torch.no_grad():
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        assert F.unfold in operators and torch.conv2d not in operators
    operators.clear()
    assert torch.allclose(compiled(x), expected, atol=1e-5)  # with gradients
    assert F.unfold not in operators and operators

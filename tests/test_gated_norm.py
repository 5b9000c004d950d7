"""RMS norm with a gate, and the norms after a residual sum, against the original."""

import pytest
import torch

from tests import goldens
from vmamba.gated_norm import Gate, GatedRMSNorm
from vmamba.norm import LayerNorm

CASES = goldens.load("op_norm_gated")["cases"]


def module(case, channels):
    options = case["options"]
    if not options.get("rms", True):
        return LayerNorm(channels, dtype=torch.float64)
    return GatedRMSNorm(
        channels,
        groups=channels // options.get("group_size", channels),
        gate_first=not options.get("norm_before_gate", False),
        bias="bias" in case["inputs"],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"])
def test_golden(case):
    tensors = {name: t.requires_grad_() for name, t in goldens.named_inputs(case).items()}
    parameters = {name: t for name, t in tensors.items() if name in ("weight", "bias")}
    total = tensors["x"] + tensors["residual"] if "residual" in tensors else tensors["x"]
    arguments = (total, tensors["z"]) if "z" in tensors else (total,)
    y = torch.func.functional_call(module(case, total.shape[-1]), parameters, arguments)
    assert goldens.compare(y, case["outputs"]["out"]) < 1e-12
    if "grad" in case:
        of = case["grad"]["of"]
        upstream = torch.from_numpy(goldens.make_input(y.shape, case["grad"]["seed"]))
        for name, grad in zip(of, torch.autograd.grad(y, [tensors[n] for n in of], upstream), strict=True):
            assert goldens.compare(grad, case["outputs"][f"d{name}"]) < 1e-12, name


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    norm = GatedRMSNorm(24, groups=3, dtype=torch.bfloat16)
    x, z = 1e3 * torch.randn(5, 24), torch.randn(5, 24).bfloat16()
    exact = GatedRMSNorm(24, groups=3, dtype=torch.float64)(x.double(), z.double())
    assert norm(x, z).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x, z).double(), exact, rtol=2**-8, atol=1e-6)


def test_the_gate_alone():
    x, z = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(Gate(5)(x, z), x * z / (1 + torch.exp(-z)))
    assert Gate(5)(x, z.half()).dtype == torch.float16


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="10 channels do not divide into 4 groups"):
        GatedRMSNorm(10, groups=4)

"""The Mamba block for sequences: the mixer of Vision Mamba on a grid of one row, read forwards."""

from tests import goldens
from vmamba.checkpoint import load_checkpoint
from vmamba.mixers.bimamba import BiMamba

KEYS = [(r"^(x_proj|dt_proj)\.weight$", r"\1"), (r"^dt_proj\.bias$", "dt_bias")]


def test_golden():
    golden = goldens.load("op_mamba_block")
    block = BiMamba(32, state=8, scan="raster").double()
    block.official_keys = KEYS
    assert load_checkpoint(block, goldens.fill_state(golden)).ok
    assert sum(p.numel() for p in block.parameters()) == golden["params"]
    for case in golden["cases"]:
        (x,) = goldens.case_inputs(case)
        assert goldens.compare(block.in_proj(x), case["outputs"]["in_proj"]) < 1e-12
        assert goldens.compare(block(x[:, None])[:, 0], case["outputs"]["out"]) < 1e-12

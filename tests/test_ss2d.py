"""SS2D and SSD2D against the original operator, in every mode that is an index table."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import goldens
from vmamba.block import Conv2d
from vmamba.checkpoint import load_checkpoint
from vmamba.mixers.ss2d import SS2D
from vmamba.mixers.ssd2d import SSD2D
from vmamba.models.vmamba import BLOCK_KEYS
from vmamba.scans import list_scans

CASES = {case["name"]: case for case in goldens.load("ss2d_modes")["cases"]}


class Softmax(nn.Module):
    """Over the pixels of each channel."""

    def forward(self, y):
        return F.softmax(y.flatten(1, 2), 1).view_as(y)


def norm(*parts):
    return lambda dim, device=None, dtype=None: nn.Sequential(*(part(dim) for part in parts))


def depthwise(dim):
    return Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)


plain = partial(SS2D, gate=None)
MIXERS = {
    "cross2d": plain,
    "cross2d_channel_last": plain,
    "unidi": partial(plain, scan="unidi"),
    "bidi": partial(plain, scan="bidi"),
    "rot2d": partial(plain, scan="rot2d"),
    "cross2d_state1": partial(plain, conv_bias=False),
    "v0_gated": SS2D,
    "v05_gated": SS2D,
    "v05_nozact": partial(SS2D, gate=nn.Identity),
    "v05_noz_oact": partial(plain, norm=norm(nn.LayerNorm, lambda dim: nn.GELU())),
    "v05_noconv": partial(plain, conv=1),
    "onnone": partial(plain, norm=norm()),
    "ondwconv3": partial(plain, norm=norm(nn.Identity, depthwise)),
    "oncnorm": partial(plain, norm=norm(nn.LayerNorm, nn.Identity, depthwise)),
    "onsoftmax": partial(plain, norm=norm(lambda dim: Softmax())),
    "onsigmoid": partial(plain, norm=norm(lambda dim: nn.Sigmoid())),
    "m0_mamba2": partial(SSD2D, gate=None, act=nn.GELU),
}
UNPUBLISHED = {"cascade2d", "cascade2d_square"}  # a mixer of its own (two passes), used by no published weights


def test_every_mode_is_covered():
    assert MIXERS.keys() | UNPUBLISHED == CASES.keys()


@pytest.mark.parametrize("name", MIXERS)
def test_mode(name):
    case, config = CASES[name], CASES[name]["config"]
    rank = {"heads" if name == "m0_mamba2" else "rank": config["dt_rank"]}
    block = nn.ModuleDict(
        {"mixer": MIXERS[name](config["d_model"], state=config["d_state"], expand=config["ssm_ratio"], **rank)}
    )
    block.official_keys = [*BLOCK_KEYS, (r"norm\.(?=weight|bias)", ("norm.", "norm.0."))]
    load_checkpoint(block.double(), {f"mixer.{key}": value for key, value in goldens.fill_state(case).items()})
    (x,) = goldens.case_inputs(case)
    expected = torch.tensor(case["outputs"]["y"]["values"], dtype=torch.float64).view(case["outputs"]["y"]["shape"])
    y = block["mixer"](x.permute(0, 2, 3, 1) if config["channel_first"] else x)
    y = y.permute(0, 3, 1, 2) if config["channel_first"] else y
    assert (y - expected).abs().max() < 1e-10 * expected.std()


@pytest.mark.parametrize("mixer", [SS2D, SSD2D])
@pytest.mark.parametrize("scan", list_scans())
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (1, 6)])
def test_any_scan_trains_on_any_grid(mixer, scan, grid):
    module = mixer(16, state=2, scan=scan)
    x = torch.randn(2, *grid, 16, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert y.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *module.parameters()])


def test_a_users_scan_changes_the_result():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 16)
    by_name = SS2D(16, scan="raster")
    by_function = SS2D(16, scan=lambda h, w: torch.arange(h * w).flip(0)[None])
    by_function.load_state_dict(by_name.state_dict())
    same = SS2D(16, scan="vmamba.scans.raster")
    same.load_state_dict(by_name.state_dict())
    assert torch.equal(by_name(x), same(x))
    assert not torch.allclose(by_name(x), by_function(x))


def test_heads_must_divide():
    with pytest.raises(ValueError, match="do not divide into 5 heads"):
        SSD2D(16, heads=5)

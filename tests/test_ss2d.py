"""SS2D and SSD2D against the original operator, in every mode that is an index table."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import goldens
from vmamba.block import Conv2d
from vmamba.checkpoint import load_checkpoint
from vmamba.mixers.cascade2d import Cascade2D
from vmamba.mixers.ss2d import SS2D
from vmamba.mixers.ssd2d import SSD2D
from vmamba.models.vmamba import BLOCK_KEYS
from vmamba.scans import Scan, raster

CASES = {case["name"]: case for case in goldens.load("ss2d_modes")["cases"]}


class Softmax(nn.Module):
    """Over the pixels of each channel."""

    def forward(self, y):
        return F.softmax(y.flatten(1, 2), 1).view_as(y)


def norm(*parts):
    return lambda dim, device=None, dtype=None: nn.Sequential(*(part(dim) for part in parts))


def depthwise(dim):
    return Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)


class Unaligned(Cascade2D):
    """As in the original, where what is read from the right is added without being turned back."""

    def scan_rows(self, x, group):
        there, back = Scan(raster), Scan(lambda h, w: raster.routes(h, w).flip(1))
        rows = F.layer_norm(x, x.shape[-1:]).flatten(0, 1)[:, None]
        y = self.scan_along(rows, there, slice(group.start, group.start + 1))
        return (y + self.scan_along(rows, back, slice(group.start + 1, group.stop)).flip(2)).view_as(x)


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
    "cascade2d": partial(Unaligned, gate=None),
    "cascade2d_square": partial(Unaligned, gate=None),
}


def test_every_mode_is_covered():
    assert MIXERS.keys() == CASES.keys()


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


@pytest.mark.parametrize(("mixer", "turns"), [(Cascade2D, True), (Unaligned, False)])
def test_a_cascade_with_equal_directions_turns_with_the_map(mixer, turns):
    torch.manual_seed(0)
    module = mixer(8, state=2, conv=1)
    with torch.no_grad():
        for parameter in (module.x_proj, module.dt_proj, module.dt_bias, module.A_log, module.D):
            parameter[1::2] = parameter[::2]
        x = torch.randn(1, 3, 5, 8)
        for axis in (1, 2):
            assert torch.allclose(module(x.flip(axis)), module(x).flip(axis), atol=1e-5) == turns


def test_heads_must_divide():
    with pytest.raises(ValueError, match="do not divide into 5 heads"):
        SSD2D(16, heads=5)

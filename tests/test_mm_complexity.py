"""vmamba info of a configuration: parameters and multiply-adds, against a count by hand and mmengine's counter."""

import json

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import nn

from tests.mm_models import mask_rcnn, upernet
from vmamba import flops
from vmamba.mm.complexity import MASKS, count
from vmamba.tools.cli import main

NAME = "vmamba_tiny_s1l8"
SMALL = """\
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
default_scope = "{scope}"
model = {model}
"""


def built(cfg, scope):
    return MODELS.build(ConfigDict({**cfg, "_scope_": scope})).eval()


def written(path, scope, model):
    path.write_text(SMALL.format(scope=scope, model=model))
    return str(path)


def test_heads_of_regions_by_hand(tmp_path, capsys):
    """What the configuration's detector has beside the maps: a thousand boxes, a hundred masks."""
    cfg = mask_rcnn(NAME)
    cfg["test_cfg"]["rpn"]["max_per_img"] = 1000
    path = written(tmp_path / "detector.py", "mmdet", cfg)
    assert main(["info", path, "--input-size", "64", "96", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    boxes = 7 * 7 * 8 * 16 + 16 * 16 + 16 * 3 + 16 * 2 * 4
    masks = 14 * 14 * 8 * 8 * 9 + 14 * 14 * 8 * 8 * 4 + 28 * 28 * 8 * 2
    pixels = sum(64 * 96 // side**2 for side in (4, 8, 16, 32))
    proposals = pixels * (8 * 8 * 9 + 8 * 3 + 8 * 3 * 4)
    model = built(cfg, "mmdet")
    body = flops.count(Maps(model), (1, 3, 64, 96))
    expected = sum(body.values()) + proposals + 1000 * boxes + MASKS * masks
    assert facts["multiply_adds"] == sum(facts["multiply_adds_by_kind"].values()) == expected
    assert facts["input"] == [3, 64, 96] and facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["parameters"] == sum(facts["parameters_by_part"].values())


class Maps(nn.Module):
    """The maps that a detector's heads look at."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.extract_feat(x)


def test_like_mmengine(tmp_path, capsys):
    """A segmentor costs what mmengine's counter, which runs it, finds, but for batch norms: 1 there, folded, 2 here."""
    cfg = upernet(NAME)
    model = built(cfg, "mmseg")
    theirs = get_model_complexity_info(model, (3, 64, 64), show_table=False, show_arch=False)["flops"]
    ours = count(model, (64, 64))
    assert ours["resizing"] > 0 and ours["matrix products"] > 0
    assert sum(ours.values()) - ours["norms"] <= theirs <= sum(ours.values()) * 1.02
    path = written(tmp_path / "segmentor.py", "mmseg", cfg)
    assert main(["info", path, "--input-size", "64"]) == 0
    text = capsys.readouterr().out
    total = sum(count(model, (64, 64)).values())
    assert f"{total / 1e9:.3f} G for an image of 3 x 64 x 64" in text and "decode_head" in text
    assert main(["info", path]) == 0
    assert "for an image of 3 x 512 x 2048" in capsys.readouterr().out


def test_mistakes(tmp_path, capsys):
    part = tmp_path / "part.py"
    part.write_text("a = 1\n")
    segmentor = written(tmp_path / "segmentor.py", "mmseg", upernet(NAME))
    unknown = written(tmp_path / "unknown.py", "mmseg", {"type": "Nothing"})
    for words, message in (
        (["nowhere.py"], "no configuration at nowhere.py"),
        ([str(part)], "describes no network (model)"),
        ([unknown], "its network cannot be built"),
        ([segmentor, "--input-size", "1", "2", "3"], "--input-size takes one or two positive numbers, got 1 2 3"),
        ([segmentor, "--input-size", "2"], "no count for images of 2 x 2"),
    ):
        assert main(["info", *words]) == 2
        assert message in capsys.readouterr().err.replace("\n", " "), words
    with pytest.raises(TypeError, match="Linear has none of rpn_head, roi_head, bbox_head, decode_head, network"):
        count(nn.Linear(2, 2), (8, 8))


def test_counting_leaves_the_model_alone():
    model = built(mask_rcnn(NAME), "mmdet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert count(model, (64, 96)) == count(model, (64, 96))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_whatever_mode_is_on():
    """Deterministic algorithms and inference mode would put other operators in the place of resizing."""
    model = built(upernet(NAME), "mmseg")
    expected = count(model, (64, 64))
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode():
            assert count(model, (64, 64)) == expected
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)

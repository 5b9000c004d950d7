"""Every network of the zoo with a golden file: parameters, outputs and features of the original, in float64."""

import math

import pytest
import torch

import vmamba
from tests import columns, goldens, segmentors
from vmamba.columnar import Columnar
from vmamba.segmentor import Segmentor

NETWORKS = [name for name in goldens.names() if name.removesuffix("_backbone") in vmamba.registry.entries()]
TOLERANCE = 1e-5  # of an output's standard deviation; reached: 3e-14


def test_networks_are_found():
    assert len(NETWORKS) >= 10


@pytest.mark.parametrize("name", NETWORKS)
def test_golden(name):
    golden = goldens.load(name)
    model = vmamba.create_model(name, **segmentors.settings(name, golden)).double().eval()
    report = vmamba.load_checkpoint(model, {"model": goldens.fill_state(golden) | goldens.second_copies(golden)})
    assert report.layout == "official" and report.ok
    unused = [math.prod(golden["state"][key]) for key in report.ignored if key not in golden.get("skip", ())]
    assert sum(p.numel() for p in model.parameters()) + sum(unused) == golden["params"]
    for case in golden["cases"]:
        (image,) = goldens.case_inputs(case)
        found = outputs(model, image)
        compared = found.keys() & case["outputs"].keys()
        assert len(compared) >= 2
        for key in compared:
            assert goldens.compare(in_layout(found[key], case["outputs"][key]), case["outputs"][key]) < TOLERANCE, key


@torch.no_grad()
def outputs(model, image):
    """Named outputs as golden files name them; maps channels-last where the model is."""
    if isinstance(model, Columnar):
        return columns.outputs(model, image)
    if isinstance(model, Segmentor):
        return segmentors.outputs(model, image)
    result = model(image)
    if isinstance(result, list):
        return {f"out{i}": y for i, y in enumerate(result)}
    stages = {f"stage{i}": y for i, y in enumerate(model.features(image))}
    return {"logits": result, "patch_embed": model.stem(image), **stages}


def in_layout(tensor, summary):
    return tensor if list(tensor.shape) == summary["shape"] else tensor.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "name",
    [
        "vmamba_small_s1l20",
        "vmamba_base_s1l20",
        "vanilla_vmamba_small",
        "vanilla_vmamba_base",
        "vmamba_small_m2",
        "vmamba_base_m2",
    ],
)
def test_parameters_of_variants_without_golden(name):
    published = {
        "vmamba_small_s1l20": 49_012_840,
        "vmamba_base_s1l20": 86_614_504,
        "vanilla_vmamba_small": 44_417_416,
        "vanilla_vmamba_base": 76_254_056,
        "vmamba_small_m2": 39_079_816,
        "vmamba_base_m2": 67_527_528,
    }
    with torch.device("meta"):
        model = vmamba.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == published[name]

"""Images that a network cannot take are refused in words that say what came and what would do."""

import pytest
import torch
from timm.models._features_fx import GraphExtractNet, get_graph_node_names

import vmamba
from tests.timm_zoo import KINDS, image, small
from vmamba.images import check_image

MISTAKES = {
    "one image": ((3, 64, 64), r"must be \(batch, 3, height, width\), got the shape \(3, 64, 64\); x\[None\] makes"),
    "pixels": ((64, 64), r"must be \(batch, 3, height, width\), got the shape \(64, 64\)$"),
    "video": ((1, 3, 4, 64, 64), r"got the shape \(1, 3, 4, 64, 64\)$"),
    "grey": ((2, 1, 64, 64), r"must have 3 channels, got 1 in the shape \(2, 1, 64, 64\); .* in_chans=1"),
    "channels last": ((2, 64, 64, 3), r"must have 3 channels, got 64 .*; x.permute\(0, 3, 1, 2\) puts channels first"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", KINDS)
def test_wrong_shapes(name, mistake):
    shape, message = MISTAKES[mistake]
    model = small(name, device="meta")
    for method in (model, model.features):
        with pytest.raises(ValueError, match=message):
            method(torch.empty(shape, device="meta"))


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_least_size_is_enough_and_less_is_not(name):
    model = small(name).eval()
    least = model.least_side
    y = model(image(1, 3, least, least))
    assert y.shape == (1, 1000) and y.isfinite().all()
    for size in ((least - 1, 64), (64, least - 1), (0, 64)):
        message = f"at least {least} x {least} pixels, got {size[0]} x {size[1]}"
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("name", KINDS[:1])
def test_other_channels(name):
    model = small(name, in_chans=5, device="meta")
    assert model(torch.empty(1, 5, 64, 64, device="meta")).shape == (1, 1000)
    with pytest.raises(ValueError, match="must have 5 channels, got 3"):
        model(torch.empty(1, 3, 64, 64, device="meta"))


def test_traced_networks_check_too():
    model = small(KINDS[0], depths=(1, 1), num_classes=3).eval()
    traced = GraphExtractNet(model, [get_graph_node_names(model)[1][-1]])
    compiled = torch.compile(model, backend="eager")
    for network in (traced, compiled):
        with torch.no_grad():
            assert network(image(1)).shape == (1, 3)
        with pytest.raises(ValueError, match="must have 3 channels, got 4"):
            network(image(1, 4))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"must be \(batch, 3, height, width\)"),
        ((1, 2, 64, 64), "must have 3 channels, got 2"),
        ((1, 3, 64, 100), r"multiples of 8, got \(64, 100\); pad the image"),
    ],
)
def test_a_unet(shape, message):
    model = vmamba.create_model("vmunet", depths=(1, 1), depths_decoder=(1, 1), dims=(8, 16))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


def test_the_image_comes_back():
    x = image(2, 3, 4, 5)
    assert check_image(x, 3, 4) is x

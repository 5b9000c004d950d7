"""Segmentation networks: published sizes, ImageNet and pre-trained weights, initialisation, what each refuses."""

import pytest
import torch

import vmamba
from tests import goldens
from tests.segmentors import image, small
from vmamba.checkpoint import fit
from vmamba.heads import hymamba, msvm_unet, swin_umamba
from vmamba.heads.umamba import ChannelMamba
from vmamba.scans import raster
from vmamba.segmentor import load_encoder
from vmamba.unet_blocks import ConvResidual, MambaLayer

PUBLISHED = {  # counted with the original code
    ("swin_umamba", 1, 14): 59_889_368,
    ("swin_umamba", 3, 8): 59_890_688,
    ("swin_umamba", 3, 9): 59_891_412,
    ("swin_umamba_d", 3, 8): 27_496_160,
    ("swin_umamba_d", 3, 9): 27_496_932,
    ("msvm_unet_tiny", 3, 4): 35_925_028,
    ("msvm_unet_small", 3, 4): 54_688_804,
    ("umamba_bot_2d", 1, 14): 47_533_012,
    ("umamba_enc_2d", 1, 14): 47_015_538,
    ("umamba_v1_bot_2d", 1, 14): 63_344_180,
    ("umamba_v1_enc_2d", 1, 14): 67_333_428,
    ("umamba_bot_3d", 1, 14): 41_945_158,
    ("umamba_enc_3d", 1, 14): 42_842_798,
    ("umamba_v1_bot_3d", 1, 14): 57_832_166,
    ("umamba_v1_enc_3d", 1, 14): 59_105_766,
}
IMAGENET = {
    "swin_umamba": swin_umamba.load_imagenet,
    "swin_umamba_d": swin_umamba.load_imagenet,
    "msvm_unet_tiny": msvm_unet.load_imagenet,
}


@pytest.mark.parametrize(("name", "in_chans", "num_classes"), PUBLISHED, ids=str)
def test_published_sizes(name, in_chans, num_classes):
    model = vmamba.create_model(name, in_chans=in_chans, num_classes=num_classes, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name, in_chans, num_classes]


def test_published_plans():
    endovis = vmamba.create_model("umamba_enc_2d", patch=(384, 640), in_chans=3, num_classes=8, device="meta")
    assert sum(p.numel() for p in endovis.parameters()) == 47_680_592
    cells = dict(features=(32, 64, 128, 256, *(512,) * 4), strides=((1, 1), *((2, 2),) * 7), in_chans=3, num_classes=3)
    bot = vmamba.create_model("umamba_v1_bot_2d", **cells, device="meta")
    assert sum(p.numel() for p in bot.parameters()) == 86_150_037
    enc = vmamba.create_model("umamba_enc_2d", **cells, patch=(512, 512), device="meta")
    assert sum(p.numel() for p in enc.parameters()) == 64_014_261


@pytest.mark.parametrize("name", IMAGENET)
def test_published_imagenet_mapping(name):
    golden = goldens.load(name)
    published = golden["pretrained"]
    source = {key: torch.from_numpy(goldens.fill(key, s)).float() for key, s in published["source_state"].items()}
    model = vmamba.create_model(name)
    names = fit(goldens.fill_state(golden), model)[1].renamed  # of the original -> ours
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    IMAGENET[name](model, {"model": source})
    after = model.state_dict()
    mapped = {names[ours]: theirs for ours, theirs in published["map"].items()}
    assert len(mapped) == len(published["map"]) > 200
    for key, tensor in after.items():
        wanted = source[mapped[key]].reshape(tensor.shape) if key in mapped else before[key]
        assert torch.equal(tensor, wanted), key


def test_imagenet_weights_of_the_stem_for_three_channels():
    golden = goldens.load("swin_umamba_d")["pretrained"]
    model = vmamba.create_model("swin_umamba_d", in_chans=3)
    swin_umamba.load_imagenet(model, {key: torch.full(s, 0.5) for key, s in golden["source_state"].items()})
    assert all((p == 0.5).all() for p in model.encoder.parameters())


@pytest.mark.parametrize("name", ["swin_umamba", "swin_umamba_d", "msvm_unet_tiny"])
def test_other_weights_are_refused(name):
    model = small(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = vmamba.create_model("vmamba_tiny_s2l5", depths=(1, 1), dim=16).state_dict()
    with pytest.raises(ValueError, match="not the weights of a classifier with this encoder"):
        IMAGENET[name](model, other)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_any_encoder_takes_its_classifiers_weights():
    classifier = vmamba.create_model("efficientvmamba_tiny", depths=(1, 1), dim=8)
    encoder = vmamba.create_model("efficientvmamba_tiny_backbone", depths=(1, 1), dim=8)
    model = vmamba.create_model("vmunet", encoder=encoder, depths_decoder=(1, 1))
    report = load_encoder(model, classifier.state_dict())
    assert report.missing == [f"norms.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")]
    body = model.encoder.body.state_dict()
    assert body and all(torch.equal(tensor, classifier.state_dict()[key]) for key, tensor in body.items())


def test_a_given_encoder_keeps_its_weights():
    encoder = vmamba.create_model("vmamba_tiny_s1l8_backbone", depths=(1, 1), dim=8)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    for name, settings in {"vmunet": dict(depths_decoder=(1, 1)), "swin_umamba_d": {}}.items():
        model = vmamba.create_model(name, encoder=encoder, in_chans=3, **settings)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.encoder.state_dict().items())


def test_hymamba_starts_from_mambamim():
    """The encoder of the pre-training's golden, at another size: everything but the positions and the decoder."""
    golden = goldens.load("mambamim")
    state = {key: t.float() for key, t in goldens.fill_state(golden).items() if key.startswith("sparse_encoder.")}
    assert state["sparse_encoder.mae.pos_embed"].shape == (1, 27, 384)
    model = vmamba.create_model("hymamba", patch=64)
    positions = model.middle.pos_embed.clone()
    report = hymamba.load_pretrained(model, state)
    assert set(report.loaded) == {k for k in model.state_dict() if k.startswith(("encoder.", "middle.blocks."))}
    assert torch.equal(model.middle.pos_embed, positions)
    assert torch.equal(model.encoder.stem.weight, state["sparse_encoder.embeddings.stem.weight"])
    with pytest.raises(ValueError, match="not the weights of a pre-trained HyMamba encoder: encoder"):
        hymamba.load_pretrained(model, {"mae.blocks.0.norm1.weight": torch.ones(384)})


@torch.no_grad()
def test_positions_of_another_grid_are_those_of_a_network_made_for_it():
    here, there = small("hymamba").eval(), small("hymamba", patch=(4, 8, 8)).eval()
    there.load_state_dict({k: v for k, v in here.state_dict().items() if "pos_embed" not in k}, strict=False)
    x = torch.randn(1, 1, 4, 8, 8)
    assert not torch.equal(here.middle.pos_embed[:, :4], there.middle.pos_embed)
    assert torch.allclose(here(x), there(x), atol=1e-5)


def test_mamba_over_channels_needs_the_patch():
    model = small("umamba_enc_2d")
    layers = [type(layer) for layer in model.mamba]
    assert layers == [MambaLayer, torch.nn.Identity, ChannelMamba]
    with pytest.raises(ValueError, match=r"made for 6 pixels, got 12 in \(4, 3\); give images of the size patch"):
        model(torch.randn(1, 1, 16, 12))
    pixels = small("umamba_enc_2d", patch=None)
    assert ChannelMamba not in {type(layer) for layer in pixels.mamba}
    assert pixels(torch.randn(1, 1, 16, 12)).shape == (1, 14, 16, 12)


@pytest.mark.parametrize("name", ["umamba_v1_enc_2d", "umamba_v1_bot_2d", "umamba_enc_2d"])
def test_only_v1_enc_starts_as_its_shortcuts(name):
    blocks = [module for module in small(name).modules() if isinstance(module, ConvResidual)]
    assert all((block.norm2.weight == 0).all() == (name == "umamba_v1_enc_2d") for block in blocks)


def test_settings_that_do_not_fit():
    for name, settings, words in [
        ("umamba_bot_2d", dict(features=(8, 16)), "2 features need as many strides and kernels, got 7 and 2"),
        ("lightm_unet_2d", dict(dim=12), "dim must be a multiple of 8, got 12"),
        ("lightm_unet_2d", dict(depths=(1, 1)), "2 levels take 1 decoder levels"),
        ("msvm_unet_tiny", dict(depths_decoder=(1, 1)), "4 maps take 3 decoder stages"),
        ("vmunet", dict(depths_decoder=(1, 1)), "4 maps need as many decoder stages"),
        ("hymamba", dict(dims=(8, 16, 32, 32, 32)), "multiple of 6 channels, got 32"),
    ]:
        with pytest.raises(ValueError, match=words):
            vmamba.create_model(name, device="meta", **settings)


def from_the_end(*grid):
    """(1, l), of maps and of volumes: the last pixel first."""
    return raster.routes(*grid).flip(1)


@pytest.mark.parametrize("name", ["umamba_bot_2d", "umamba_enc_3d", "lightm_unet_2d", "lightm_unet_3d", "hymamba"])
@torch.no_grad()
def test_maps_and_volumes_are_read_in_the_order_that_is_given(name):
    there, back = small(name).eval(), small(name, scan=from_the_end).eval()
    back.load_state_dict(there.state_dict())
    x = image(there, 1)
    assert not torch.allclose(there(x), back(x), rtol=1e-3)
    assert torch.equal(there(x), small(name, scan=raster.routes).eval()(x))

"""MobileMamba: the original's figures inside, folding for inference, splits, distillation, checkpoints."""

import pytest
import timm
import torch
from torch import nn

import vmamba
from tests import goldens
from tests.timm_zoo import image, small
from vmamba.checkpoint import fit, load_checkpoint
from vmamba.convbn import ConvBN
from vmamba.mixers.multi_receptive import MultiReceptiveMixer, WaveletConv, WaveletMamba, local_conv
from vmamba.models.mobilemamba import MIXER_KEYS

PARAMETERS = {"t2": 8_806_682, "t4": 14_137_690, "s6": 14_996_696, **dict.fromkeys(("b1", "b2", "b4"), 17_070_625)}
SIZES = {"t2": 192, "t4": 192, "s6": 224, "b1": 256, "b2": 384, "b4": 512}
SPLITS = {
    "t2": [[112, 28, 4], [192, 54, 26], [224, 110, 34]],
    "t4": [[144, 32, 0], [256, 73, 39], [272, 134, 42]],
    "s6": [[160, 32, 0], [272, 76, 36], [272, 134, 42]],
    "b1": [[160, 40, 0], [256, 75, 45], [272, 134, 42]],
}
NAME = "mobilemamba_t2"
INSIDE = {  # name in the golden file -> module of the first block
    "": "",
    ".dw0": "dw0",
    ".ffn0": "ffn0",
    ".ffn1": "ffn1",
    ".mixer": "mixer",
    ".mixer.global": "mixer.inner.far",
    ".mixer.ss2d": "mixer.inner.far.ssm",
    ".mixer.ss2d_scaled": "mixer.inner.far.scale",
    ".mixer.wavelet_branch": "mixer.inner.far.wavelet",
    ".mixer.local": "mixer.inner.near",
}
OPERATOR = goldens.load("op_mobilemamba_mixer")
BUILD = {  # part of the operator's golden file -> channels it sees, where its names lie in a mixer, module
    "level1": (16, "global_op.", lambda: nn.ModuleDict({"far": WaveletMamba(16, kernel=5)})),
    "level3": (16, "global_op.", lambda: nn.ModuleDict({"far": WaveletMamba(16, kernel=3, levels=3, expand=1)})),
    "local": (12, "local_op.", lambda: nn.ModuleDict({"near": local_conv(12, 7)})),
    "mixer": (40, "", lambda: MultiReceptiveMixer(40, kernel=3, global_ratio=0.6, local_ratio=0.3)),
}


def filled(variant, **options):
    """A network in float64 with the golden weights, and its golden file."""
    golden = goldens.load(f"mobilemamba_{variant}")
    model = vmamba.create_model(f"mobilemamba_{variant}", **options).double().eval()
    load_checkpoint(model, {"net": goldens.fill_state(golden), "net_E": {}, "epoch": 1})
    return model, golden


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def errors(model, case):
    """Largest error of the logits and of the maps of each stage."""
    (x,) = goldens.case_inputs(case)
    found = {"logits": model(x), "patch_embed": model.stem(x).permute(0, 3, 1, 2)}
    found |= {f"blocks{i}": y.permute(0, 3, 1, 2) for i, y in enumerate(model.features(x), 1)}
    return {key: goldens.compare(y, case["outputs"][key]) for key, y in found.items()}


@pytest.mark.parametrize("variant", ["t2", "t4", "b1", "b4"])
def test_stages_before_and_after_folding(variant):
    model, golden = filled(variant)
    assert len(norms(model)) > 70
    for _ in range(2):
        for case in golden["cases"]:
            assert max(errors(model, case).values()) < 1e-11
        assert model.fuse() is model and not norms(model)


def test_inside_the_first_block():
    model, golden = filled("t2")
    case, found = golden["cases"][0], {}
    block = model.stages[0].blocks[0]
    for key, path in INSIDE.items():
        block.get_submodule(path).register_forward_hook(lambda _, __, y, key=key: found.update({f"b0{key}": y}))
    with torch.no_grad():
        model(goldens.case_inputs(case)[0])
    for key, y in found.items():
        assert goldens.compare(y.permute(0, 3, 1, 2), case["outputs"][key]) < 1e-11, key
    assert {key for key in case["outputs"] if key.startswith("b0")} == found.keys() | {"b0.mixer.wavelet"}


@pytest.mark.parametrize("part", BUILD)
@torch.no_grad()
def test_mixer(part):
    channels, place, build = BUILD[part]
    model = build().double().eval()
    model.official_keys = MIXER_KEYS
    state = {key: tensor for key, tensor in goldens.fill_state(OPERATOR).items() if key.startswith(f"{part}.")}
    load_checkpoint(model, {key.replace(f"{part}.", place, 1): tensor for key, tensor in state.items()})
    module = model if part == "mixer" else next(iter(model.children()))
    for case in OPERATOR["cases"]:
        (x,) = goldens.case_inputs(case)
        x = x[:, :channels].permute(0, 2, 3, 1)
        found = {part: module(x)}
        if isinstance(module, WaveletMamba):
            found |= {f"{part}.ss2d": module.ssm(x), f"{part}.wavelet_branch": module.wavelet(x)}
        for key, y in found.items():
            assert goldens.compare(y.permute(0, 3, 1, 2), case["outputs"][key]) < 1e-11, key


@pytest.mark.parametrize("variant", PARAMETERS)
def test_published_settings(variant):
    model = timm.create_model(f"mobilemamba_{variant}", device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]
    assert model.pretrained_cfg["input_size"] == (3, SIZES[variant], SIZES[variant])
    assert model.strides == (16, 32, 64)
    mixers = [stage.blocks[0].mixer.inner for stage in model.stages]
    assert [mixer.widths for mixer in mixers] == SPLITS[variant if variant in SPLITS else "b1"]
    assert [mixer.far.wavelet.convs[0].conv.kernel_size[0] for mixer in mixers] == [7, 5, 3]


@pytest.mark.parametrize("options", [{}, {"distillation": True}, {"scan": "cross"}, {"num_classes": 0}])
@torch.no_grad()
def test_folding_in_single_precision(options):
    model = small(NAME, **options).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.ndim == 1:  # batch norms, biases and scales
            tensor.add_(torch.rand_like(tensor), alpha=0.3)
    x = image(2, 3, 97, 70)
    before, maps = model(x), model.features(x)
    folded = timm.utils.reparameterize_model(model)  # a copy; the model's own fuse() works in place
    assert norms(model) and norms(folded) == ([] if model.num_classes else ["head.bn"])
    assert not [m for m in folded.modules() if isinstance(m, ConvBN)]
    for y, z in zip([before, *maps], [folded(x), *folded.features(x)], strict=True):
        assert (y - z).abs().max() < 1e-5 * y.abs().max() < torch.inf
    again = folded.fuse()(x)
    assert torch.equal(again, folded(x))


def test_a_new_block_doubles_its_input():
    block = small(NAME).stages[0].blocks[0].eval()
    x = torch.randn(2, 5, 4, 16)
    assert torch.equal(block(x), 2 * x)


def test_distillation():
    model, x = small(NAME, distillation=True, num_classes=7, drop_path_rate=0.0), image(2)
    with torch.no_grad():
        model.eval()
        last = model.forward_features(x)
        pair = model.head(last), model.head_dist(last)
        assert not torch.equal(*pair)
        torch.testing.assert_close(model(x), (pair[0] + pair[1]) / 2)
    model.train()
    assert model(x).shape == (2, 7)
    model.set_distilled_training()
    assert [y.shape for y in model(x)] == [(2, 7), (2, 7)]
    assert isinstance(model.eval()(x), torch.Tensor)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="distillation=True"):
        small(NAME).set_distilled_training()


def test_official_checkpoint_with_filters():
    golden = goldens.load("mobilemamba_t2")
    filters = {key: torch.full(shape, 0.49999997) for key, shape in golden["state"].items() if "wt_filter" in key}
    state = {**goldens.fill_state(golden), **filters, "head_dist.l.bias": torch.zeros(1000)}
    assert len(filters) == 10
    model = vmamba.create_model("mobilemamba_t2", device="meta")
    report = fit({"net": state}, model)[1]
    assert report.unexpected == ["head_dist.fc.bias"] and not report.missing and not report.misshapen
    assert report.ignored[:10] == list(filters)


def test_distilled_checkpoint():
    model = small(NAME, distillation=True)
    official = {"head.bn.weight": "head.bn.weight", "head_dist.bn.bias": "head_dist.bn.bias"}
    official |= {"head.fc.bias": "head.l.bias", "head_dist.fc.weight": "head_dist.l.weight"}
    state = {official.get(key, key): tensor for key, tensor in model.state_dict().items()}
    assert load_checkpoint(model, state).renamed.keys() == {"head.l.bias", "head_dist.l.weight"}


def test_maps_stay_channels_last():
    for layer in ConvBN(6, 8, 3, stride=2), ConvBN(6, 6, 5, groups=6):
        for training in (True, False):
            y = layer.train(training)(torch.randn(2, 9, 7, 6))
            assert y.is_contiguous() and y.shape[1:3] in ((5, 4), (9, 7))


def test_synchronised_batch_norm():
    model, x = small(NAME).eval(), image()
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(nn.SyncBatchNorm.convert_sync_batchnorm(model)(x), expected, atol=1e-6)


def test_pyramid():
    model = vmamba.create_model("mobilemamba_t2_backbone", norm=False, depths=(1, 1, 1), dims=(16, 32, 48))
    maps = model.eval()(image(1, 3, 100, 65))
    assert [tuple(y.shape) for y in maps] == [(1, 16, 7, 5), (1, 32, 4, 3), (1, 48, 2, 2)]
    assert not any(name.startswith("norms") for name in model.state_dict())


@pytest.mark.parametrize("levels", [1, 2])
def test_wavelet_and_levels(levels):
    """Bands multiplied by 1 / levels: the map itself, and its low band once more from each deeper level."""
    layer = WaveletConv(5, kernel=1, levels=levels, wavelet="bior2.2").double()
    for conv in layer.convs:
        nn.init.ones_(conv.conv.weight)
        nn.init.constant_(conv.scale.weight, 1 / levels)
    x = torch.randn(2, 7, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = layer.wavelet.synthesise(layer.wavelet.analyse(x) * torch.tensor([1, 0, 0, 0]), 7, 9)
    torch.testing.assert_close(layer(x), sum([x, low][:levels]) / levels)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        WaveletConv(4, levels=0)
    with pytest.raises(ValueError, match=r"1\.0 of 24 channels is rounded to 32"):
        MultiReceptiveMixer(24, global_ratio=1.0)
    with pytest.raises(ValueError, match="nope"):
        WaveletMamba(16, wavelet="nope")

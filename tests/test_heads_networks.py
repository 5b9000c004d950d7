"""What all segmentation networks do: shapes, deep supervision, gradients, types, compilation, errors, any encoder."""

from itertools import cycle

import pytest
import torch

import vmamba
from tests import segmentors, timm_zoo
from tests.segmentors import NAMES, image, small
from vmamba.heads.umamba import _repeated, nearest
from vmamba.registry import entries
from vmamba.unet_blocks import MambaLayer

COMPILED = [
    "hymamba",
    "lightm_unet_3d",
    "msvm_unet_tiny",
    "swin_umamba",
    "swin_umamba_d",
    "umamba_enc_2d",
    "umamba_v1_enc_2d",
]
KINDS = [*COMPILED, "vmunet", "mhs_unet_4h", "lightm_unet_2d", "umamba_enc_3d"]  # test_matrix.py compiles their mixers
SUPERVISED = [name for name in NAMES if len(small(name).outputs) > 1]
READERS = {  # networks that read with any backbone -> settings for n maps
    "vmunet": lambda n: dict(depths_decoder=(1,) * n),
    "swin_umamba": lambda n: {},
    "swin_umamba_d": lambda n: dict(depth_decoder=1),
    "msvm_unet_tiny": lambda n: dict(depths_decoder=(1,) * (n - 1)),
}


def test_every_network_is_here():
    assert {"mhs_unet_3h", "hymamba", "umamba_v1_enc_3d"} <= set(NAMES) and set(READERS) <= set(NAMES)
    assert {entries()[name].cls for name in KINDS} == {entries()[name].cls for name in NAMES}
    assert segmentors.SHRINK.keys() == segmentors.POINTS.keys() == {entries()[name].cls for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_trains(name):
    model = small(name, num_classes=3, deep_supervision=True).train()
    x = image(model).requires_grad_()
    maps = model(x)
    assert len(maps) == len(model.outputs)
    assert maps[0].shape == (2, 3, *x.shape[2:])
    assert all(y.shape[:2] == (2, 3) and y.isfinite().all() for y in maps)
    tensors = {"x": x, **dict(model.named_parameters())}
    grads = torch.autograd.grad(sum(y.square().sum() for y in maps), tensors.values(), allow_unused=True)
    assert not [n for n, grad in zip(tensors, grads, strict=True) if grad is None or not grad.isfinite().all()]


@pytest.mark.parametrize("name", NAMES)
def test_empty_surroundings_keep_gradients_small(name):
    """Half of an image is exactly 0, as nnU-Net's normalisation leaves it around a brain: no norm may blow up there."""
    depths = {"depths": (2, 2, 2)} if name.startswith("swin") else {}
    model = small(name, num_classes=3, **depths).train()
    x, sizes = image(model), []
    for y in (x, torch.where(torch.arange(x.shape[-1]) < x.shape[-1] // 2, x, 0)):
        torch.manual_seed(0)
        grads = torch.autograd.grad(model.logits(y).square().mean(), list(model.parameters()), allow_unused=True)
        sizes.append(sum(float(grad.double().square().sum()) for grad in grads if grad is not None) ** 0.5)
    assert sizes[1] < 10 * sizes[0]


@pytest.mark.parametrize("name", SUPERVISED)
@torch.no_grad()
def test_deep_supervision_is_an_attribute(name):
    model = small(name).eval()
    x = image(model)
    alone = model(x)
    model.deep_supervision = True
    maps = model(x)
    assert torch.equal(maps[0], alone) and torch.equal(model.logits(x), alone) and len(maps) == len(model.outputs)
    sizes = [y.shape[2:].numel() for y in maps]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", KINDS)
def test_starts_afresh_from_meta(name):
    model = small(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()
    model.init_weights(needs_reset=True)
    fresh = small(name).state_dict()
    for key, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), key
        spread, wanted = tensor.double().std(correction=0), fresh[key].double().std(correction=0)
        assert (spread == 0) == (wanted == 0), key
        assert tensor.numel() < 200 or torch.isclose(spread, wanted, rtol=0.4), key


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_low_precision(name):
    model = small(name).eval()
    x = image(model)
    kinds = []
    for layer in model.modules():
        if isinstance(layer, MambaLayer):
            layer.register_forward_hook(lambda module, inputs, y: kinds.append(y.dtype))
    wanted = model.logits(x)
    with torch.backends.mkldnn.flags(enabled=False):  # its Conv3d of tiny maps in bfloat16 is wrong here (torch 2.11)
        with torch.autocast("cpu", torch.bfloat16):
            got = model.logits(x)
        assert set(kinds) <= {torch.float32}
        assert model.bfloat16().logits(x.bfloat16()).isfinite().all()
    assert torch.corrcoef(torch.stack([got.flatten(), wanted.flatten()]).float())[0, 1] > 0.95


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_compiled_is_eager(name):
    model = small(name).eval()
    x = image(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("name", KINDS)
def test_wrong_images(name):
    model = small(name, device="meta")
    x = image(model).to("meta")
    for wrong, words in [
        (x[0], "makes a batch of one"),
        (torch.cat([x, x], 1), f"must have {model.in_chans} channels, got {2 * model.in_chans}"),
        (x[..., 1:], "must be multiples of"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(wrong)


@pytest.mark.parametrize(("reader", "name"), list(zip(cycle(READERS), timm_zoo.KINDS, strict=False)))
@torch.no_grad()
def test_any_backbone_is_an_encoder(reader, name):
    body = timm_zoo.small(name)
    levels = 4 if len(body.channels) > 4 else len(body.channels)  # of a column: its quarters
    model = vmamba.create_model(reader, num_classes=2, in_chans=3, encoder=body, **READERS[reader](levels)).eval()
    assert model.stride == model.encoder.strides[-1]
    x = torch.randn(1, 3, model.stride, 2 * model.stride)
    assert model(x).shape == (1, 2, *x.shape[2:]) and model(x).isfinite().all()


@pytest.mark.parametrize("reader", READERS)
def test_encoders_by_name(reader):
    model = vmamba.create_model(reader, encoder="vmamba_tiny_s1l8", in_chans=5, device="meta")
    assert type(model.encoder.body).__name__ == "VMamba" and model.encoder.channels == (96, 192, 384, 768)
    assert model(torch.empty(1, 5, 64, 96, device="meta")).shape[2:] == (64, 96)
    with pytest.raises(ValueError, match=r"unknown model .*did you mean vmamba_tiny"):
        vmamba.create_model(reader, encoder="vmamba_tiny_s1l9")
    with pytest.raises(ValueError, match="an encoder has channels and strides"):
        vmamba.create_model(reader, encoder=torch.nn.Conv2d(3, 8, 3))


def test_pixels_are_repeated_after_the_convolution():
    block, x = nearest(3, 4, 6, (1, 2, 3), dtype=torch.float64), torch.randn(2, 4, 2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x), torch.nn.Sequential(*block)(x), rtol=1e-12, atol=1e-12)
    seen = []
    block[1].register_forward_hook(lambda _, inputs, y: seen.append(y.shape))
    block(x)
    assert seen == [(2, 6, 2, 3, 5)]
    with torch.autocast("cpu", torch.bfloat16):
        y = nearest(2, 4, 6, 2)(torch.randn(2, 4, 3, 5))
    assert y.dtype == torch.bfloat16 and y.shape == (2, 6, 6, 10)
    volume = torch.randn(2, 4, 2, 3, 5).contiguous(memory_format=torch.channels_last_3d)
    repeated = _repeated(volume, (1, 2, 3))
    assert torch.equal(repeated, torch.nn.Upsample(scale_factor=(1, 2, 3))(volume))
    assert repeated.is_contiguous(memory_format=torch.channels_last_3d)

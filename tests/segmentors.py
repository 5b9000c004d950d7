"""What segmentation networks compute on the way, under the names of golden files."""

import math

import torch
from torch import Tensor, nn

from vmamba.heads.hymamba import HyMamba
from vmamba.heads.lightm_unet import LightMUNet
from vmamba.heads.mhs_unet import MHSUNet
from vmamba.heads.msvm_unet import MSVMUNet
from vmamba.heads.swin_umamba import SwinUMamba, SwinUMambaD
from vmamba.heads.umamba import UMamba
from vmamba.heads.vmunet import VMUNet
from vmamba.registry import create_model, entries
from vmamba.segmentor import Segmentor

POINTS = {  # class -> {name in golden files: path of the module that returns it}
    VMUNet: {},
    MHSUNet: {
        "block0": "encoder.0.blocks.0",
        "block0.mhs": "encoder.0.blocks.0.mixer.join",
        **{f"up{i}": f"decoder.{i}" for i in range(4)},
    },
    HyMamba: {
        **{f"emb{i + 1}": f"encoder.skips.{i}" for i in range(4)},
        "emb5": "encoder.levels.3.-1",
        "mae": "middle",
        **{f"dec{4 - i}": f"decoder.{i}" for i in range(4)},
        "dec0": "last",
    },
    LightMUNet: {
        "conv_init": "stem",
        "down0.block0.conv1": "encoder.0.1.layer1",
        **{f"down{i}": f"encoder.{i}" for i in range(4)},
        **{f"up{i}": f"decoder.{i}" for i in range(3)},
    },
    MSVMUNet: {
        "layer0": "encoder.body.stem.act",
        "layer1": "encoder.body.stem",
        "enc_block0": "encoder.body.stages.0.blocks.0",
        **{f"enc{i}": f"encoder.body.stages.{i}.blocks" for i in range(4)},
        **{f"lkpe{i}": f"decoder.{i}.expand" for i in range(3)},
        "dec0.fused": "decoder.0.reduce",
        "dec0.mlp": "decoder.0.blocks.0.mlp",
        **{f"dec{i}": f"decoder.{i}" for i in range(3)},
    },
    SwinUMamba: {
        "stem": "stem",
        **{f"vss{i + 1}": f"encoder.body.stages.{i}.blocks" for i in range(4)},
        **{f"enc{i + 1}": f"skips.{i}" for i in range(5)},
        **{f"dec{6 - i}": f"decoder.{i}" for i in range(5)},
        "dec1": "last",
    },
    SwinUMambaD: {
        **{f"vss{i + 1}": f"encoder.body.stages.{i}.blocks" for i in range(4)},
        **{f"expand{i}": f"decoder.{i}.expand" for i in range(3)},
        **{f"dec{i}": f"decoder.{i}" for i in range(3)},
        "expand3": "last",
    },
    UMamba: {
        "stem": "stem",
        "bottleneck.mamba": "mamba.-1",
        **{f"stage{i}.conv": f"stages.{i}" for i in range(7)},
        **{f"stage{i}.mamba": f"mamba.{i}" for i in range(7)},
        **{f"dec{i}": f"decoder.{i}" for i in range(6)},
    },
}

SHRINK = {  # class -> settings of a small network of its kind, beside those of a variant
    VMUNet: dict(dims=(8, 16), depths=(1, 1), depths_decoder=(1, 1)),
    MHSUNet: dict(dims=(8, 16), depths=(1, 1), depths_decoder=(1, 1)),
    HyMamba: dict(dims=(4, 8, 12), depths=(1, 1), ratios=(2, 2), depth=1, patch=(8, 12, 4)),
    LightMUNet: dict(dim=8, depths=(1, 1, 1), depths_decoder=(1, 1)),
    MSVMUNet: dict(dim=8, depths=(1, 1), depths_decoder=(1,)),
    SwinUMamba: dict(dim=8, depths=(1, 1)),
    SwinUMambaD: dict(dim=8, depths=(1, 1), depth_decoder=1),
    UMamba: dict(features=(4, 8, 8)),
}
NAMES = [name for name, entry in entries().items() if issubclass(entry.cls, Segmentor)]


def small(name: str, **options) -> Segmentor:
    """A small network of the kind of ``name``, the same weights each time."""
    torch.manual_seed(0)
    settings, shrunk = entries()[name].settings, dict(SHRINK[entries()[name].cls])
    for key in ("strides", "kernels"):
        if key in settings:
            shrunk[key] = settings[key][: len(shrunk["features"])]
    if "strides" in settings and "patch" in settings:
        shrunk["patch"] = grid_of([math.prod(side) for side in zip(*shrunk["strides"], strict=True)])
    return create_model(name, **{**shrunk, **options})


def grid_of(strides) -> list[int]:
    """Sides of images that networks with these strides halve down to a map of 2 x 3 (x 1) pixels."""
    return [side * n for side, n in zip(strides, (2, 3, 1), strict=False)]


def image(model: Segmentor, batch: int = 2) -> Tensor:
    """Images of the sides that :func:`grid_of` gives."""
    strides = (model.stride,) * model.axes if isinstance(model.stride, int) else model.stride
    return torch.randn(batch, model.in_chans, *grid_of(strides))


SETTINGS = {  # names in the configurations of golden files -> ours
    "features_per_stage": "features",
    "kernel_sizes": "kernels",
    "strides": "strides",
    "input_size": "patch",
    "img_size": "patch",
}


def settings(name: str, golden) -> dict:
    """The settings by which a golden file's segmentation network differs from the published one."""
    if name not in NAMES:
        return {}
    return {ours: golden["config"][theirs] for theirs, ours in SETTINGS.items() if theirs in golden["config"]}


@torch.no_grad()
def outputs(model: Segmentor, image: Tensor) -> dict[str, Tensor]:
    """The points of the model's class, its result (output), logits, and each output of deep supervision (ds0, ...)."""
    modules, found = dict(model.named_modules()), {}
    modules |= {f"{name}.-1": module[-1] for name, module in modules.items() if isinstance(module, nn.ModuleList)}

    def keep(name):
        return lambda module, inputs, result: found.update({name: result})

    points = {name: path for name, path in POINTS[type(model)].items() if path in modules}
    hooks = [modules[path].register_forward_hook(keep(name)) for name, path in points.items()]
    model.deep_supervision = True
    maps = model(image)
    model.deep_supervision = False
    for hook in hooks:
        hook.remove()
    logits = maps[0] if type(model).finish is Segmentor.finish else model.logits(image)
    return {**found, **{f"ds{i}": y for i, y in enumerate(maps)}, "output": maps[0], "logits": logits}

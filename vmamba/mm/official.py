"""Backbones under the type names and arguments of the published OpenMMLab configurations, which load as they are.

An official type has one class for all sizes; its arguments say which. Here they are looked up among those of the
published variants: what is given must agree with one of them, or there is no network to load the weights into.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import MODELS

from vmamba.mm.backbone import VMambaBackbone
from vmamba.registry import find, list_models

OURS = {  # official argument -> ours: what every type has
    "out_indices": "out_indices",
    "pretrained": "pretrained",
    "init_cfg": "init_cfg",
    "frozen_stages": "frozen_stages",
    "norm_eval": "norm_eval",
    "with_cp": "with_cp",
    "use_checkpoint": "with_cp",
    "drop_path_rate": "drop_path_rate",
    "in_chans": "in_channels",
}


@dataclass(frozen=True)
class Official:
    """An official type: the arguments of each variant, and where its arguments have another name here.

    Of an argument that several values mean the same for, ``variants`` has them in a set.
    """

    variants: Mapping[str, Mapping[str, Any]]
    ours: Mapping[str, str]
    origin: str

    def find(self, given: Mapping[str, Any]) -> str:
        """The variant whose arguments agree with those ``given``; of several, the first.

        Raises:
            ValueError: there is none; the message has the arguments of the nearest one.
        """
        wrong = {
            variant: {key: value for key, value in given.items() if key in args and not _agrees(value, args[key])}
            for variant, args in self.variants.items()
        }
        nearest = min(wrong, key=lambda variant: ("depths" in wrong[variant], len(wrong[variant])))
        if wrong[nearest]:
            has = ", ".join(f"{key}={self.variants[nearest][key]}" for key in wrong[nearest])
            got = ", ".join(f"{key}={value}" for key, value in wrong[nearest].items())
            advice = "for a network of your own take VMambaBackbone with a variant and settings"
            raise ValueError(f"no published network of {self.origin} has {got}; {nearest} has {has}; {advice}")
        return nearest


def _agrees(given: Any, published: Any) -> bool:
    given = tuple(given) if isinstance(given, list) else given
    return given in published if isinstance(published, frozenset) else given == published


SAME = dict(patch_size=4, ssm_dt_rank="auto", ssm_conv=3, mlp_act_layer="gelu", gmlp=False, posembed=False)
FIRST = dict(ssm_ratio=2.0, ssm_conv_bias=True, downsample_version="v1", patchembed_version="v1", mlp_ratio=0.0, **SAME)
NEWER = dict(downsample_version="v3", patchembed_version="v2", mlp_ratio=4.0, ssm_d_state=1, **SAME)
V2 = dict(NEWER, ssm_conv_bias=False, ssm_act_layer="silu", forward_type=frozenset(f"v0{i}_noz" for i in range(1, 6)))
GENERATIONS: dict[str, Mapping[str, Any]] = {  # shell pattern of variants -> their arguments besides depths and dims
    "vanilla_vmamba_*": dict(FIRST, ssm_d_state=16, ssm_act_layer="silu", forward_type=frozenset({"v0", "v0seq"})),
    "vmamba_*_s1l*": dict(V2, ssm_ratio=1.0),
    "vmamba_*_s2l*": dict(V2, ssm_ratio=2.0),
    "vmamba_*_m2": dict(V2, ssm_ratio=1.0, ssm_d_state=64, ssm_act_layer="gelu", forward_type="m0_noz"),
    "msvmamba_[nmt]*": dict(FIRST, ssm_d_state=1, forward_type="v2", sscore_type="multiscale_4scan_12"),
    "msvmamba_v3_[ts]*": dict(NEWER, ssm_ratio=1.0, ssm_conv_bias=True, forward_type="vms_noz"),
    "msvmamba_v3_base": dict(NEWER, ssm_ratio=1.0, ssm_conv_bias=True, forward_type="vms"),
}
EFFICIENT = dict(patch_size=4, d_state=16, dt_rank="auto", ssm_ratio=2.0, mlp_ratio=0.0, step_size=2)
ROTARY = dict(
    if_rope=True, if_rope_residual=True, use_residual_as_feature=True, last_layer_process="add", if_cls_token=True
)
PLAIN = dict(
    if_rope=False, if_rope_residual=False, use_residual_as_feature=False, last_layer_process="none", if_cls_token=False
)
BLOCKS = dict(depth=24, rms_norm=True, bimamba_type="v2", if_divide_out=True)
VIM = dict(patch_size=16, stride=16, if_abs_pos_embed=True, if_fpn=True, **BLOCKS)
SHUFFLE = dict(patch_size=16, depth=24, rms_norm=False, bimamba_type="v2")
HARMLESS = (
    "norm_layer", "imgsize", "ssm_init", "ssm_drop_rate", "mlp_drop_rate", "patch_norm", "num_classes", "window_size",
    "fused_add_norm", "residual_in_fp32", "final_pool_type",
)  # fmt: skip


def _pyramids(pattern: str, generation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants that match ``pattern`` with their official arguments; ``dims`` may be one width or all."""
    found = {}
    for name in list_models(pattern):
        depths, dim = find(name).settings["depths"], find(name).settings["dim"]
        widths = frozenset({dim, tuple(dim * 2**i for i in range(len(depths)))})
        found[name] = {"depths": tuple(depths), "dims": widths, **generation}
    return found


VSSM = Official(
    variants={name: args for pattern, gen in GENERATIONS.items() for name, args in _pyramids(pattern, gen).items()},
    ours=OURS,
    origin="VMamba or MSVMamba",
)
OFFICIAL = {
    "MM_VSSM": VSSM,
    "VSSM": VSSM,
    "Backbone_VSSM": VSSM,
    "Backbone_EfficientVSSM": Official(_pyramids("efficientvmamba_*", EFFICIENT), OURS, "EfficientVMamba"),
    "VisionMambaSeg": Official(
        variants={
            "vim_tiny_patch16_seg": dict(VIM, **PLAIN, embed_dim=192),
            "vim_small_patch16_seg": dict(VIM, **ROTARY, embed_dim=384),
        },
        ours={**OURS, "img_size": "img_size"},
        origin="Vim",
    ),
    "Backbone_VideoMamba": Official(
        variants={
            "shufflemamba_seg_tiny": dict(SHUFFLE, embed_dim=192),
            "shufflemamba_seg_base": dict(SHUFFLE, embed_dim=768),
        },
        ours={**OURS, "shuffle_rate": "shuffle_rate"},
        origin="ShuffleMamba",
    ),
}


def _builder(name: str, official: Official) -> type[VMambaBackbone]:
    def __init__(self, **given):
        variant = given.pop("variant", None) or official.find(given)
        ours = {official.ours[key]: value for key, value in given.items() if key in official.ours}
        known = {*official.ours, *HARMLESS, *official.variants[variant]}
        if unknown := sorted(set(given) - known):
            print_log(f"{name} does nothing with {', '.join(unknown)}", logger="current", level=logging.WARNING)
        VMambaBackbone.__init__(self, variant, **ours)

    doc = f"``{name}`` of {official.origin}: a VMambaBackbone that takes its arguments, and ``variant`` to name one."
    return type(name, (VMambaBackbone,), {"__init__": __init__, "__doc__": doc, "__module__": __name__})


def register() -> None:
    """Add the official types, but for those that somebody has already registered."""
    for name, official in OFFICIAL.items():
        if name not in MODELS.module_dict:
            MODELS.register_module(name=name, module=_builder(name, official))

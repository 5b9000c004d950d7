"""VMamba: Visual State Space Model (arXiv:2401.10166, NeurIPS 2024). Original code and weights: MzeroMiko/VMamba, MIT.

Four stages of residual blocks around SS2D. Three generations: vanilla (gated, 16 states, no MLP), v2 (1 state, no gate,
MLP) and m2 (state-space duality in place of the selective scan; no published weights).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from vmamba.backbone import Backbone, Stage
from vmamba.block import Block, ConvDownsample, ConvStem, PatchMerging, PatchStem, drop_path_rates
from vmamba.mixers.ss2d import SS2D
from vmamba.mixers.ssd2d import SSD2D
from vmamba.registry import Weights, register


class VMamba(Backbone):
    """Stem at stride 4, stages at strides 4, 8, 16, 32 with channels dim, 2 dim, 4 dim, 8 dim.

    Args:
        depths: blocks per stage.
        dim: channels of the first stage.
        mixer: builds a block's mixer, ``mixer(dim, scan=..., device=..., dtype=...)``.
        mlp_ratio: hidden width of the MLPs over their channels; 0 for none.
        stem, downsample: classes of the stem and of the downsampling between stages.
        scan: the order in which the mixers read the map: a name, ``"package.module"`` or a function.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        **backbone: ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``, ``device``, ``dtype`` of
            :class:`Backbone`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dim: int,
        mixer: Callable[..., nn.Module],
        mlp_ratio: float = 4.0,
        stem: Callable[..., nn.Module] = ConvStem,
        downsample: Callable[..., nn.Module] = ConvDownsample,
        scan: "str | Callable" = "cross",
        drop_path_rate: float = 0.0,
        **backbone,
    ):
        super().__init__(**backbone)
        dd = self._dd
        channels = [dim * 2**i for i in range(len(depths))]
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            down = downsample(channels[i - 1], channels[i], **dd) if i else nn.Identity()
            build = partial(Block, channels[i], mixer=partial(mixer, scan=scan), mlp_ratio=mlp_ratio, **dd)
            stages.append(Stage(down, [build(drop_path=rate) for rate in rates]))
        self.build(
            stem(self.in_chans, dim, **dd), stages, channels=channels, strides=[4 * 2**i for i in range(len(depths))]
        )


VANILLA: dict[str, Any] = dict(mixer=SS2D, mlp_ratio=0.0, stem=PatchStem, downsample=PatchMerging)
S1 = dict(mixer=partial(SS2D, state=1, expand=1.0, conv_bias=False, gate=None))
S2 = dict(mixer=partial(SS2D, state=1, expand=2.0, conv_bias=False, gate=None))
M2 = dict(mixer=partial(SSD2D, state=64, expand=1.0, conv_bias=False, gate=None, act=nn.GELU))

VARIANTS = {
    "vmamba_tiny_s1l8": dict(depths=(2, 2, 8, 2), dim=96, drop_path_rate=0.2, **S1),
    "vmamba_small_s1l20": dict(depths=(2, 2, 20, 2), dim=96, drop_path_rate=0.3, **S1),
    "vmamba_base_s1l20": dict(depths=(2, 2, 20, 2), dim=128, drop_path_rate=0.5, **S1),
    "vmamba_tiny_s2l5": dict(depths=(2, 2, 5, 2), dim=96, drop_path_rate=0.2, **S2),
    "vmamba_small_s2l15": dict(depths=(2, 2, 15, 2), dim=96, drop_path_rate=0.3, **S2),
    "vmamba_base_s2l15": dict(depths=(2, 2, 15, 2), dim=128, drop_path_rate=0.6, **S2),
    "vanilla_vmamba_tiny": dict(depths=(2, 2, 9, 2), dim=96, drop_path_rate=0.2, **VANILLA),
    "vanilla_vmamba_small": dict(depths=(2, 2, 27, 2), dim=96, drop_path_rate=0.3, **VANILLA),
    "vanilla_vmamba_base": dict(depths=(2, 2, 27, 2), dim=128, drop_path_rate=0.6, **VANILLA),
    "vmamba_tiny_m2": dict(depths=(2, 2, 4, 2), dim=96, drop_path_rate=0.2, **M2),
    "vmamba_small_m2": dict(depths=(2, 2, 12, 2), dim=96, drop_path_rate=0.3, **M2),
    "vmamba_base_m2": dict(depths=(2, 2, 12, 2), dim=128, drop_path_rate=0.3, **M2),
}

# official name -> ours, applied in order; of a tuple, the first that gives a name the model has
BLOCK_KEYS = [
    (r"(blocks\.\d+)\.(?:norm|ln_1)\.", r"\1.norm1."),
    (r"(blocks\.\d+)\.(?:op|self_attention)\.", r"\1.mixer."),
    (r"mixer\.conv2d\.(?:1\.)?", "mixer.conv."),
    (r"mixer\.out_norm\.", "mixer.norm."),
    (r"mixer\.x_proj[._]weight$", "mixer.x_proj"),
    (r"mixer\.dt_projs[._]weight$", "mixer.dt_proj"),
    (r"mixer\.dt_projs_bias$", "mixer.dt_bias"),
    (r"mixer\.A_logs$", "mixer.A_log"),
    (r"mixer\.Ds$", "mixer.D"),
]
KEYS = [
    (r"^patch_embed\.(?:0|proj)\.", "stem.conv1."),
    (r"^patch_embed\.(?:2|norm)\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"downsample\.1\.", ("downsample.conv.", "downsample.norm.")),
    (r"downsample\.2\.", "downsample.reduction."),
    (r"downsample\.3\.", "downsample.norm."),
    (r"^layers\.", "stages."),
    *BLOCK_KEYS,
    (r"^classifier\.norm\.", "norm."),
    (r"^(?:classifier\.)?head\.(?=weight$|bias$)", "head.fc."),
]

_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"
WEIGHTS = {
    "vmamba_tiny_s1l8": Weights(_RELEASES + "%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", top1=82.6),
    "vmamba_small_s1l20": Weights(_RELEASES + "%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", top1=83.3),
    "vmamba_base_s1l20": Weights(_RELEASES + "%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", top1=83.8),
    "vmamba_tiny_s2l5": Weights(_RELEASES + "%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", top1=82.5),
    "vmamba_small_s2l15": Weights(_RELEASES + "%23v2cls/vssm_small_0229_ckpt_epoch_222.pth", top1=83.6),
    "vmamba_base_s2l15": Weights(_RELEASES + "%23v2cls/vssm_base_0229_ckpt_epoch_237.pth", top1=83.9),
    "vanilla_vmamba_tiny": Weights(_RELEASES + "%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", top1=82.2),
    "vanilla_vmamba_small": Weights(_RELEASES + "%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", top1=83.5),
    "vanilla_vmamba_base": Weights(_RELEASES + "%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth", top1=83.7),
}

register(
    VMamba,
    VARIANTS,
    keys=KEYS,
    weights=WEIGHTS,
    paper="2401.10166",
    origin="https://github.com/MzeroMiko/VMamba",
    license="mit",
    timm=dict(first_conv="stem.conv1", classifier="head.fc", pool_size=(7, 7)),
)

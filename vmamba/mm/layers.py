"""Layers that heads of published detectors are built of and that mmcv does not have."""

from mmengine.registry import MODELS
from timm.layers import LayerNorm2d


def register() -> None:
    """Add ``norm_cfg=dict(type="LN2d")``: LayerNorm over the channels of maps (b, c, h, w), as in ViTDet's heads."""
    if "LN2d" not in MODELS.module_dict:
        MODELS.register_module(name="LN2d", module=LayerNorm2d)

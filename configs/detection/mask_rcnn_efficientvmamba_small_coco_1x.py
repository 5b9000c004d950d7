"""Mask R-CNN with EfficientVMamba-S on COCO, 12 epochs.

    vmamba train configs/detection/mask_rcnn_efficientvmamba_small_coco_1x.py
    tools/dist_train.sh configs/detection/mask_rcnn_efficientvmamba_small_coco_1x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: no figure of this network is known to us.
Source: the recipe of github.com/TerryPei/EfficientVMamba, which adds --amp; its necks for other widths are mended here.
Parameters of the whole network: none published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/detection_1x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="efficientvmamba_small", out_indices=(0, 1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

"""Mask R-CNN with VMamba-S (s2l15) on COCO, 12 epochs.

    vmamba train configs/detection/mask_rcnn_vmamba_small_s2l15_coco_1x.py
    tools/dist_train.sh configs/detection/mask_rcnn_vmamba_small_s2l15_coco_1x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 48.7, mask AP 43.7.
Source: VMamba's README (github.com/MzeroMiko/VMamba).
Parameters of the whole network: 69.7M published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/detection_1x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vmamba_small_s2l15", out_indices=(0, 1, 2, 3), drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

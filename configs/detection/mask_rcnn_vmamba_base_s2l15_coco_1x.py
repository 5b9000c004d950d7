"""Mask R-CNN with VMamba-B (s2l15) on COCO, 12 epochs.

    vmamba train configs/detection/mask_rcnn_vmamba_base_s2l15_coco_1x.py
    tools/dist_train.sh configs/detection/mask_rcnn_vmamba_base_s2l15_coco_1x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 49.2, mask AP 44.1.
Source: VMamba's README (github.com/MzeroMiko/VMamba).
Parameters of the whole network: 108M published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/detection_1x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vmamba_base_s2l15", out_indices=(0, 1, 2, 3), drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

"""Mask R-CNN with VMamba-T (s2l5) on COCO, 36 epochs.

    vmamba train configs/detection/mask_rcnn_vmamba_tiny_s2l5_coco_3x.py
    tools/dist_train.sh configs/detection/mask_rcnn_vmamba_tiny_s2l5_coco_3x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 48.9, mask AP 43.7.
Source: VMamba's README (github.com/MzeroMiko/VMamba).
Parameters of the whole network: 50.2M published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance_multiscale.py",
    "../_base_/schedules/detection_3x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vmamba_tiny_s2l5", out_indices=(0, 1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

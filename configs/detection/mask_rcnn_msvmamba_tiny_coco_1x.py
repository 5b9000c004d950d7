"""Mask R-CNN with MSVMamba-T on COCO, 12 epochs.

    vmamba train configs/detection/mask_rcnn_msvmamba_tiny_coco_1x.py
    tools/dist_train.sh configs/detection/mask_rcnn_msvmamba_tiny_coco_1x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 46.9, mask AP 42.2.
Source: MSVMamba's README (github.com/YuHengsss/MSVMamba).
Parameters of the whole network: 53M published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/detection_1x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="msvmamba_tiny", out_indices=(0, 1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

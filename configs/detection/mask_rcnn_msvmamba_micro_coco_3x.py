"""Mask R-CNN with MSVMamba-M on COCO, 36 epochs.

    vmamba train configs/detection/mask_rcnn_msvmamba_micro_coco_3x.py
    tools/dist_train.sh configs/detection/mask_rcnn_msvmamba_micro_coco_3x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 46.3, mask AP 41.8.
Source: MSVMamba's README (github.com/YuHengsss/MSVMamba).
Parameters of the whole network: 32M published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance_multiscale.py",
    "../_base_/schedules/detection_3x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="msvmamba_micro", out_indices=(0, 1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

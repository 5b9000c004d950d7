"""Cascade Mask R-CNN with MambaVision-T on COCO, 36 epochs.

    vmamba train configs/detection/cascade_mask_rcnn_mambavision_t_coco_3x.py
    tools/dist_train.sh configs/detection/cascade_mask_rcnn_mambavision_t_coco_3x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 51.1, mask AP 44.3.
Source: MambaVision's README (github.com/NVlabs/MambaVision); the drop path is its code's default.
Parameters of the whole network: 86M (not this network's) published.
"""

_base_ = [
    "../_base_/models/cascade_mask_rcnn.py",
    "../_base_/datasets/coco_instance_multiscale.py",
    "../_base_/schedules/detection_3x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="mambavision_t", out_indices=(0, 1, 2, 3), drop_path_rate=0.2, windows=(None, None, 112, 56)),
    neck=dict(in_channels=[80, 160, 320, 640]),
)

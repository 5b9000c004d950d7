"""Mask R-CNN with PPMA-B on COCO, 36 epochs.

    vmamba train configs/detection/mask_rcnn_ppma_base_coco_3x.py
    tools/dist_train.sh configs/detection/mask_rcnn_ppma_base_coco_3x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 52.6, mask AP 46.3.
Source: PPMA's README (github.com/zhongchenzhao/PPMA); the drop path is the classifier's.
Parameters of the whole network: 73M published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance_multiscale.py",
    "../_base_/schedules/detection_3x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="ppma_base", out_indices=(0, 1, 2, 3), drop_path_rate=0.4),
    neck=dict(in_channels=[80, 160, 320, 512]),
)

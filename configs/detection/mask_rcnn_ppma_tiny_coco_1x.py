"""Mask R-CNN with PPMA-T on COCO, 12 epochs.

    vmamba train configs/detection/mask_rcnn_ppma_tiny_coco_1x.py
    tools/dist_train.sh configs/detection/mask_rcnn_ppma_tiny_coco_1x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 47.1, mask AP 42.4.
Source: PPMA's README (github.com/zhongchenzhao/PPMA); the drop path is the classifier's.
Parameters of the whole network: 33M published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/detection_1x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="ppma_tiny", out_indices=(0, 1, 2, 3), drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

"""Mask R-CNN with ViM2-T, as we read its paper, on COCO, 12 epochs.

    vmamba train configs/detection/mask_rcnn_vim2_tiny_coco_1x.py
    tools/dist_train.sh configs/detection/mask_rcnn_vim2_tiny_coco_1x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 47.1, mask AP 42.4, of the paper's network after 12 or 36 epochs.
Source: arXiv:2403.19888, which has no code; what it leaves open is VMamba's recipe.
Parameters of the whole network: 39M (not this network's) published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/detection_1x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vim2_tiny", out_indices=(0, 1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

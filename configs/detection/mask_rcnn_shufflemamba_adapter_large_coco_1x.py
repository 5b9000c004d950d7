"""Mask R-CNN with ShuffleMamba-L with ViT-Adapter on COCO, 12 epochs.

    vmamba train configs/detection/mask_rcnn_shufflemamba_adapter_large_coco_1x.py
    tools/dist_train.sh configs/detection/mask_rcnn_shufflemamba_adapter_large_coco_1x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: no figure of this network is known to us.
Source: the recipe of github.com/huangzizheng01/ShuffleMamba.
Parameters of the whole network: 383M published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/detection_1x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="shufflemamba_adapter_large"),
    neck=dict(in_channels=[1024, 1024, 1024, 1024], norm_cfg=dict(type="SyncBN")),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9))

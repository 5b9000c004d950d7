"""Cascade Mask R-CNN (ViTDet's) with Vim-Ti on COCO, 184,375 iterations of 64 images.

    vmamba train configs/detection/cascade_mask_rcnn_vim_tiny_patch16_det_coco_lsj.py
    tools/dist_train.sh configs/detection/cascade_mask_rcnn_vim_tiny_patch16_det_coco_lsj.py 8

Hardware: 8 GPUs, 8 images each.
Expected: box AP 45.7, mask AP 39.2.
Source: arXiv:2401.09417; learning rate, weight decay and clipping are ViTDet's (arXiv:2203.16527).
Parameters of the whole network: none published.
"""

_base_ = [
    "../_base_/models/cascade_mask_rcnn_vitdet.py",
    "../_base_/datasets/coco_instance_lsj.py",
    "../_base_/schedules/detection_vitdet.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vim_tiny_patch16_det", drop_path_rate=0.1),
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1), paramwise_cfg=dict(decay_rate=0.837), clip_grad=dict(max_norm=1.0)
)

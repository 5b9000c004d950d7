"""UPerNet with PPMA-B on Cityscapes, 160,000 iterations.

    vmamba train configs/segmentation/upernet_ppma_base_cityscapes_160k.py
    tools/dist_train.sh configs/segmentation/upernet_ppma_base_cityscapes_160k.py 8

Hardware: 8 GPUs, 1 image each.
Expected: mIoU 83.9 (one scale), 84.3 (scales and flips).
Source: PPMA's README (github.com/zhongchenzhao/PPMA); the drop path is the classifier's.
Parameters of the whole network: none published.
"""

_base_ = [
    "../_base_/models/upernet_cityscapes.py",
    "../_base_/datasets/cityscapes.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="ppma_base", out_indices=(0, 1, 2, 3), drop_path_rate=0.4),
    decode_head=dict(in_channels=[80, 160, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))

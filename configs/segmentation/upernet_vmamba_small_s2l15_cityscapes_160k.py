"""UPerNet with VMamba-S (s2l15) on Cityscapes, 160,000 iterations.

    vmamba train configs/segmentation/upernet_vmamba_small_s2l15_cityscapes_160k.py
    tools/dist_train.sh configs/segmentation/upernet_vmamba_small_s2l15_cityscapes_160k.py 8

Hardware: 8 GPUs, 1 image each.
Expected: no figure is published.
Source: none of this backbone: PPMA's recipe for Cityscapes (github.com/zhongchenzhao/PPMA).
Parameters of the whole network: none published.
"""

_base_ = [
    "../_base_/models/upernet_cityscapes.py",
    "../_base_/datasets/cityscapes.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vmamba_small_s2l15", out_indices=(0, 1, 2, 3), drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

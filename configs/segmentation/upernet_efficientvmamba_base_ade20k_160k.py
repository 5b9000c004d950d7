"""UPerNet with EfficientVMamba-B on ADE20K, 160,000 iterations.

    vmamba train configs/segmentation/upernet_efficientvmamba_base_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/upernet_efficientvmamba_base_ade20k_160k.py 8

Hardware: 8 GPUs, 2 images each.
Expected: mIoU 46.5 (one scale).
Source: secondary listings of arXiv:2403.09977; the code has no segmentation: VMamba's recipe.
Parameters of the whole network: none published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="efficientvmamba_base", out_indices=(0, 1, 2, 3), drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

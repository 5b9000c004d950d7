"""UPerNet with VMamba-T (s1l8) on ADE20K, 160,000 iterations.

    vmamba train configs/segmentation/upernet_vmamba_tiny_s1l8_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/upernet_vmamba_tiny_s1l8_ade20k_160k.py 8

Hardware: 8 GPUs, 2 images each.
Expected: mIoU 47.9 (one scale), 48.8 (scales and flips).
Source: VMamba's README (github.com/MzeroMiko/VMamba).
Parameters of the whole network: 61,902,572 published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vmamba_tiny_s1l8", out_indices=(0, 1, 2, 3), drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

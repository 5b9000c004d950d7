"""UPerNet with VMamba-S (s2l15) on ADE20K, 160,000 iterations.

    vmamba train configs/segmentation/upernet_vmamba_small_s2l15_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/upernet_vmamba_small_s2l15_ade20k_160k.py 8

Hardware: 8 GPUs, 2 images each.
Expected: mIoU 50.6 (one scale), 51.2 (scales and flips).
Source: VMamba's README (github.com/MzeroMiko/VMamba).
Parameters of the whole network: 81,801,260 published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vmamba_small_s2l15", out_indices=(0, 1, 2, 3), drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

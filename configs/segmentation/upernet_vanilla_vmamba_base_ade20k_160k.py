"""UPerNet with Vanilla-VMamba-B on ADE20K, 160,000 iterations.

    vmamba train configs/segmentation/upernet_vanilla_vmamba_base_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/upernet_vanilla_vmamba_base_ade20k_160k.py 8

Hardware: 8 GPUs, 2 images each.
Expected: mIoU 50.0 (one scale), 51.3 (scales and flips).
Source: VMamba's README (github.com/MzeroMiko/VMamba).
Parameters of the whole network: 109,765,548 published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vanilla_vmamba_base", out_indices=(0, 1, 2, 3), drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

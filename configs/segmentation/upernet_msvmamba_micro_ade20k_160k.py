"""UPerNet with MSVMamba-M on ADE20K, 160,000 iterations.

    vmamba train configs/segmentation/upernet_msvmamba_micro_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/upernet_msvmamba_micro_ade20k_160k.py 8

Hardware: 8 GPUs, 2 images each.
Expected: mIoU 45.1 (one scale), 45.4 (scales and flips).
Source: MSVMamba's README (github.com/YuHengsss/MSVMamba).
Parameters of the whole network: 42M published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="msvmamba_micro", out_indices=(0, 1, 2, 3), drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

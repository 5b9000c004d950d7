"""UPerNet with MambaVision-B on ADE20K, crops of 512, 160,000 iterations.

    vmamba train configs/segmentation/upernet_mambavision_b_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/upernet_mambavision_b_ade20k_160k.py 8

Hardware: 16 GPUs, 1 image each; published with --amp.
Expected: mIoU 49.1 (one scale).
Source: MambaVision's README (github.com/NVlabs/MambaVision); the drop path is its code's default.
Parameters of the whole network: 126M (not this network's) published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="mambavision_b", out_indices=(0, 1, 2, 3), drop_path_rate=0.2, windows=(None, None, 64, 32)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
train_dataloader = dict(batch_size=1)

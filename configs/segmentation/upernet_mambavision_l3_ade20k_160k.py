"""UPerNet with MambaVision-L3 of ImageNet-21k on ADE20K, crops of 640, 160,000 iterations.

    vmamba train configs/segmentation/upernet_mambavision_l3_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/upernet_mambavision_l3_ade20k_160k.py 8

Hardware: 16 GPUs, 1 image each; published with --amp.
Expected: mIoU 53.2 (one scale).
Source: MambaVision's README (github.com/NVlabs/MambaVision); the drop path is its code's default; windows: as for 512.
Parameters of the whole network: 780M published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_640.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(variant="mambavision_l3", out_indices=(0, 1, 2, 3), drop_path_rate=0.2, windows=(None, None, 64, 32)),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
train_dataloader = dict(batch_size=1)

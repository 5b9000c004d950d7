"""PSPNet with MobileMamba-B4 on ADE20K, 80,000 iterations.

    vmamba train configs/segmentation/pspnet_mobilemamba_b4_ade20k_80k.py
    tools/dist_train.sh configs/segmentation/pspnet_mobilemamba_b4_ade20k_80k.py 8

Hardware: 8 GPUs, 2 images each.
Expected: mIoU 36.9 (one scale).
Source: arXiv:2411.15941 and github.com/lewandofskee/MobileMamba; batch, weight decay and warm-up are ours.
Parameters of the whole network: 20.5M (not this network's) published.
"""

_base_ = [
    "../_base_/models/pspnet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="mobilemamba_b4", out_indices=(0, 1, 2), drop_path_rate=0.03),
    decode_head=dict(in_channels=448),
    auxiliary_head=dict(in_channels=376),
)
optim_wrapper = dict(
    optimizer=dict(lr=1.2e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(decode_head=dict(lr_mult=10.0), auxiliary_head=dict(lr_mult=10.0))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=80000, by_epoch=False),
]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))

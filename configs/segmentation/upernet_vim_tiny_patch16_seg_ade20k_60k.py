"""UPerNet with Vim-Ti on ADE20K, 60,000 iterations.

    vmamba train configs/segmentation/upernet_vim_tiny_patch16_seg_ade20k_60k.py
    tools/dist_train.sh configs/segmentation/upernet_vim_tiny_patch16_seg_ade20k_60k.py 8

Hardware: 8 GPUs, 4 images each.
Expected: mIoU 41.0 (one scale).
Source: arXiv:2401.09417; the recipe is that of github.com/hustvl/Vim, in 32 bits.
Parameters of the whole network: 13M published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vim_tiny_patch16_seg", out_indices=(5, 11, 17, 23)),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.1), paramwise_cfg=dict(decay_rate=0.92))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
train_cfg = dict(max_iters=60000, val_interval=6000)
default_hooks = dict(checkpoint=dict(interval=6000))
train_dataloader = dict(batch_size=4)

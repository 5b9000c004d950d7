"""Semantic FPN with VCMamba-S on ADE20K, 40,000 iterations.

    vmamba train configs/segmentation/semantic_fpn_vcmamba_s_ade20k_40k.py
    tools/dist_train.sh configs/segmentation/semantic_fpn_vcmamba_s_ade20k_40k.py 8

Hardware: 8 GPUs, 4 images each (the paper's batch is 4 a GPU).
Expected: no mIoU of this size is published.
Source: VCMamba's README (github.com/Wertyuui345/VCMamba).
Parameters of the whole network: none published.
"""

_base_ = [
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vcmamba_s", out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[32, 64, 144, 288]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False)]
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
train_dataloader = dict(batch_size=4)

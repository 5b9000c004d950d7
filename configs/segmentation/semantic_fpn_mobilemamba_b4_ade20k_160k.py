"""Semantic FPN with MobileMamba-B4 on ADE20K, 160,000 iterations.

    vmamba train configs/segmentation/semantic_fpn_mobilemamba_b4_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/semantic_fpn_mobilemamba_b4_ade20k_160k.py 8

Hardware: 8 GPUs, 2 images each.
Expected: mIoU 42.5 (one scale).
Source: arXiv:2411.15941 and github.com/lewandofskee/MobileMamba; batch, weight decay and warm-up are ours.
Parameters of the whole network: 19.8M (52,224 of them constant filters) published.
"""

_base_ = [
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="mobilemamba_b4", out_indices=(0, 1, 2), drop_path_rate=0.03),
    neck=dict(in_channels=[200, 376, 448], num_outs=3),
    decode_head=dict(in_channels=[256, 256, 256], in_index=[0, 1, 2], feature_strides=[16, 32, 64]),
    test_cfg=dict(_delete_=True, mode="whole"),
)
optim_wrapper = dict(
    optimizer=dict(lr=1.2e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(decode_head=dict(lr_mult=10.0))),
)

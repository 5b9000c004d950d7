"""UPerNet with PPMA-S on ADE20K, 160,000 iterations.

    vmamba train configs/segmentation/upernet_ppma_small_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/upernet_ppma_small_ade20k_160k.py 8

Hardware: 8 GPUs, 2 images each.
Expected: mIoU 51.1 (one scale), 52.0 (scales and flips).
Source: PPMA's README (github.com/zhongchenzhao/PPMA); the drop path is the classifier's.
Parameters of the whole network: 56M published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="ppma_small", out_indices=(0, 1, 2, 3), drop_path_rate=0.15),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))

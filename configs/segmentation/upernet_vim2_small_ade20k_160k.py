"""UPerNet with ViM2-S, as we read its paper, on ADE20K, 160,000 iterations.

    vmamba train configs/segmentation/upernet_vim2_small_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/upernet_vim2_small_ade20k_160k.py 8

Hardware: 8 GPUs, 2 images each.
Expected: mIoU 50.2 (one scale), 51.4 (scales and flips), of the paper's network.
Source: arXiv:2403.19888, which has no code; what it leaves open is VMamba's recipe.
Parameters of the whole network: 75M published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="vim2_small", out_indices=(0, 1, 2, 3), drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

"""UPerNet with ShuffleMamba-B with ViT-Adapter on ADE20K, 160,000 iterations.

    vmamba train configs/segmentation/upernet_shufflemamba_adapter_base_ade20k_160k.py
    tools/dist_train.sh configs/segmentation/upernet_shufflemamba_adapter_base_ade20k_160k.py 8

Hardware: 8 GPUs, 2 images each.
Expected: no figure of this network is known to us.
Source: the recipe of github.com/huangzizheng01/ShuffleMamba.
Parameters of the whole network: none published.
"""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/segmentation_160k.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="shufflemamba_adapter_base"),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

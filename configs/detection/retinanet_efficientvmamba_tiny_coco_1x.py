"""RetinaNet with EfficientVMamba-T on COCO, 12 epochs.

    vmamba train configs/detection/retinanet_efficientvmamba_tiny_coco_1x.py
    tools/dist_train.sh configs/detection/retinanet_efficientvmamba_tiny_coco_1x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 37.5.
Source: secondary listings of arXiv:2403.09977; the code has no RetinaNet: the usual 1x recipe.
Parameters of the whole network: 13M (not this network's) published.
"""

_base_ = [
    "../_base_/models/retinanet.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/detection_1x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="efficientvmamba_tiny", out_indices=(0, 1, 2, 3), drop_path_rate=0.2),
    neck=dict(type="FPN", in_channels=[48, 96, 192, 384], start_level=1, add_extra_convs="on_input", num_outs=5),
)

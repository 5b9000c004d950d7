"""RetinaNet with EfficientVMamba-B on COCO, 12 epochs.

    vmamba train configs/detection/retinanet_efficientvmamba_base_coco_1x.py
    tools/dist_train.sh configs/detection/retinanet_efficientvmamba_base_coco_1x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: no figure of this network is known to us.
Source: secondary listings of arXiv:2403.09977; the code has no RetinaNet: the usual 1x recipe.
Parameters of the whole network: 44M published.
"""

_base_ = [
    "../_base_/models/retinanet.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/detection_1x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="efficientvmamba_base", out_indices=(0, 1, 2, 3), drop_path_rate=0.2),
    neck=dict(type="FPN", in_channels=[96, 192, 384, 768], start_level=1, add_extra_convs="on_input", num_outs=5),
)

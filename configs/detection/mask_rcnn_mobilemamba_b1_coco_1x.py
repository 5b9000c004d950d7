"""Mask R-CNN with MobileMamba-B1 on COCO, 12 epochs.

    vmamba train configs/detection/mask_rcnn_mobilemamba_b1_coco_1x.py
    tools/dist_train.sh configs/detection/mask_rcnn_mobilemamba_b1_coco_1x.py 8

Hardware: 8 GPUs, 2 images each.
Expected: box AP 40.6, mask AP 37.4.
Source: arXiv:2411.15941 and github.com/lewandofskee/MobileMamba; batch norms stay as pretrained.
Parameters of the whole network: 38.0M (52,224 of them constant filters) published.
"""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/detection_1x.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="mobilemamba_b1", out_indices=(0, 1, 2), drop_path_rate=0.03, norm_eval=True),
    neck=dict(_delete_=True, type="TransposedFPN", in_channels=[200, 376, 448], out_channels=256, finer=2, coarser=0),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4), clip_grad=dict(max_norm=0.1))

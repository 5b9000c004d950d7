"""SSDLite with MobileMamba-B1 on COCO, images of 512 x 512, 120 epochs of five rounds each.

    vmamba train configs/detection/ssdlite_mobilemamba_b1_coco_512.py
    tools/dist_train.sh configs/detection/ssdlite_mobilemamba_b1_coco_512.py 8

Hardware: 8 GPUs, 24 images each.
Expected: box AP 29.5.
Source: arXiv:2411.15941 and github.com/lewandofskee/MobileMamba; the anchors are those for 320, scaled.
Parameters of the whole network: 18.0M (8,489,336 of them unused or constant) published.
"""

_base_ = [
    "../_base_/models/ssdlite.py",
    "../_base_/datasets/coco_ssd_512.py",
    "../_base_/schedules/detection_ssd.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(variant="mobilemamba_b1", out_indices=(0, 1), drop_path_rate=0.03),
    neck=dict(in_channels=(200, 376), out_channels=(200, 376, 512, 256, 256, 128)),
    bbox_head=dict(
        in_channels=(200, 376, 512, 256, 256, 128),
        anchor_generator=dict(
            strides=[16, 32, 64, 128, 256, 512],
            min_sizes=[77, 160, 240, 323, 405, 486],
            max_sizes=[160, 240, 323, 405, 486, 512],
        ),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=2.4e-3))

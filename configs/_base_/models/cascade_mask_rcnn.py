"""Cascade Mask R-CNN as in Swin (arXiv:2103.14030): four convolutions with SyncBN, a GIoU loss, 80 classes.

The backbone and the neck's ``in_channels`` are to be added.
"""

_base_ = "cascade_mask_rcnn_vitdet.py"

model = dict(
    neck=dict(_delete_=True, type="FPN", out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=1),
    roi_head=dict(
        bbox_head=[
            dict(
                type="Shared4Conv1FCBBoxHead",
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=dict(type="SyncBN", requires_grad=True),
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=stds),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
            )
            for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        ],
        mask_head=dict(norm_cfg=None),
    ),
)

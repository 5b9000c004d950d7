"""DeepLabV3 of 256 channels on the third of three maps; otherwise as ``pspnet.py``."""

_base_ = "pspnet.py"

model = dict(
    decode_head=dict(
        _delete_=True,
        type="ASPPHead",
        in_index=2,
        channels=256,
        dilations=(1, 6, 12, 18),
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
)

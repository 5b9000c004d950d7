"""UPerNet for the 19 classes of Cityscapes, tested by windows of 1024; otherwise as ``upernet.py``."""

_base_ = "upernet.py"

side = (1024, 1024)
model = dict(
    data_preprocessor=dict(size=side),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(mode="slide", crop_size=side, stride=(768, 768)),
)

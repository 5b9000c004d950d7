"""184,375 iterations at batch 64 (100 epochs of COCO): a tenth after 163,889 and 177,546 (ViTDet, arXiv:2203.16527)."""

_base_ = "detection_1x.py"

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", begin=0, end=184375, by_epoch=False, milestones=[163889, 177546], gamma=0.1),
]
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=184375, val_interval=9219)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=9219),
)
log_processor = dict(by_epoch=False)

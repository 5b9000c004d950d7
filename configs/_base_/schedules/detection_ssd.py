"""120 epochs of AdamW at batch 192: 500 iterations of warm-up, then a cosine down to 0; mmdet's runtime."""

_base_ = "detection_1x.py"

epochs = 120
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", begin=0, T_max=epochs, end=epochs, by_epoch=True, eta_min=0.0),
]
train_cfg = dict(max_epochs=epochs, val_interval=5)
default_hooks = dict(checkpoint=dict(interval=5))
env_cfg = dict(cudnn_benchmark=True)

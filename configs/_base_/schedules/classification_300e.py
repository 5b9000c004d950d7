"""300 epochs of AdamW at batch 1024: 20 of warm-up from 1e-6, then a cosine down to 1e-5; mmengine's runtime."""

epochs, warm_up = 300, 20
default_scope = "mmengine"
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="VMambaOptimWrapperConstructor",
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=warm_up, by_epoch=True, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        T_max=epochs - warm_up,
        eta_min=1e-5,
        begin=warm_up,
        end=epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=100),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3, save_best="accuracy/top1", rule="greater"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [dict(type="VMambaEMAHook", momentum=1e-4)]
env_cfg = dict(cudnn_benchmark=True)

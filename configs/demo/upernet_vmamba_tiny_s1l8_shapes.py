"""UPerNet with VMamba-T (s1l8) on shapes, from nothing: shows within minutes that training works.

    vmamba shapes data/shapes
    vmamba train configs/demo/upernet_vmamba_tiny_s1l8_shapes.py --amp bfloat16

Hardware: 1 GPU.
Expected: mIoU 90 after 7 minutes on an H200.
Source: vmamba's own demonstration; docs/openmmlab.md has the curves.
"""

_base_ = ["../_base_/models/upernet.py", "../_base_/datasets/ade20k.py", "../_base_/schedules/segmentation_160k.py"]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
palette = [[120, 120, 120], [230, 159, 0], [86, 180, 233], [0, 158, 115], [204, 121, 167], [213, 94, 0]]
classes, steps = dict(classes=("ground", "disc", "square", "triangle", "ring", "cross"), palette=palette), 2400
model = dict(
    data_preprocessor=dict(size=(256, 256), test_cfg=dict(size_divisor=32)),
    backbone=dict(variant="vmamba_tiny_s1l8", out_indices=(0, 1, 2, 3), drop_path_rate=0.0),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=6),
    auxiliary_head=dict(in_channels=384, num_classes=6),
)
load = [dict(type="LoadReadable"), dict(type="LoadAnnotations")]
flip = dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"])
resize, pack = dict(type="Resize", scale=(256, 256), keep_ratio=True), dict(type="PackSegInputs")
pipeline, test_pipeline = [dict(type="SeedBySample"), *load, resize, flip, pack], [load[0], resize, load[1], pack]
data = dict(type="BaseSegDataset", data_root="data/shapes/ade", metainfo=classes, reduce_zero_label=True)
data.update(img_suffix=".jpg", seg_map_suffix=".png")
sampler = dict(_delete_=True, type="NumberedSampler", shuffle=True)
train_dataloader = dict(batch_size=16, sampler=sampler, dataset=dict(pipeline=pipeline, **data))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=6e-4, weight_decay=0.05), clip_grad=dict(max_norm=5.0))
start = dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100)
param_scheduler = [start, dict(type="PolyLR", power=1.0, by_epoch=False, begin=100, end=steps)]
train_cfg = dict(max_iters=steps, val_interval=400)
saved = dict(type="WholeCheckpointHook", interval=400, max_keep_ckpts=1, save_best="mIoU")
default_hooks = dict(logger=dict(interval=20), checkpoint=saved)
custom_hooks = [dict(type="SeedByIterationHook"), dict(type="MeanLossHook")]
randomness = dict(seed=0)

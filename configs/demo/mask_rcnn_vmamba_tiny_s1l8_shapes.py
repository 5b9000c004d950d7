"""Mask R-CNN with VMamba-T (s1l8) on shapes, from nothing: shows within minutes that training works.

    vmamba shapes data/shapes
    vmamba train configs/demo/mask_rcnn_vmamba_tiny_s1l8_shapes.py --amp bfloat16

Hardware: 1 GPU.
Expected: AP50 0.92 of boxes and 0.91 of masks after 6 minutes on an H200.
Source: vmamba's own demonstration; docs/openmmlab.md has the curves.
"""

_base_ = ["../_base_/models/mask_rcnn.py", "../_base_/datasets/coco_instance.py", "../_base_/schedules/detection_1x.py"]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
steps, norm = 750, dict(type="GN", num_groups=32)
classes = dict(classes=("disc", "square", "triangle", "ring", "cross"))
model = dict(
    backbone=dict(variant="vmamba_tiny_s1l8", out_indices=(0, 1, 2, 3), drop_path_rate=0.0),
    neck=dict(in_channels=[96, 192, 384, 768], norm_cfg=norm),
    roi_head=dict(bbox_head=dict(num_classes=5), mask_head=dict(num_classes=5, norm_cfg=norm)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=300), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300), rcnn=dict(max_per_img=30)),
)
load = [dict(type="LoadReadable"), dict(type="LoadAnnotations", with_bbox=True, with_mask=True)]
flip = dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"])
resize, pack = dict(type="Resize", scale=(256, 256), keep_ratio=True), dict(type="PackDetInputs")
pipeline, test_pipeline = [dict(type="SeedBySample"), *load, resize, flip, pack], [load[0], resize, load[1], pack]
data = dict(data_root="data/shapes/coco/", metainfo=classes)
sampler = dict(_delete_=True, type="NumberedSampler", shuffle=True)
test_set = dict(batch_size=8, dataset=dict(pipeline=test_pipeline, **data))
train_dataloader = dict(batch_size=16, sampler=sampler, batch_sampler=None, dataset=dict(pipeline=pipeline, **data))
val_dataloader, test_dataloader = test_set, test_set
val_evaluator = dict(ann_file="data/shapes/coco/annotations/instances_val2017.json")
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=3e-4), clip_grad=dict(max_norm=5.0))
start = dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100)
param_scheduler = [start, dict(type="CosineAnnealingLR", by_epoch=False, begin=100, end=steps, T_max=steps - 100)]
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=steps, val_interval=250)
saved = dict(type="WholeCheckpointHook", by_epoch=False, interval=250, max_keep_ckpts=1, save_best="coco/segm_mAP_50")
default_hooks = dict(logger=dict(interval=20, log_metric_by_epoch=False), checkpoint=saved)
custom_hooks = [dict(type=f"{name}Hook") for name in ("DetectorOperators", "SeedByIteration", "MeanLoss")]
log_processor, randomness = dict(by_epoch=False), dict(seed=0)

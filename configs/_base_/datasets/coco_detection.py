"""COCO 2017 in data/coco for detectors without masks: otherwise as ``coco_instance.py``."""

_base_ = "coco_instance.py"

load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
train_pipeline = [
    *load,
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
test_pipeline = [
    load[0],
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    load[1],
    dict(type="PackDetInputs", meta_keys=test_meta),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=["bbox"])
test_evaluator = val_evaluator

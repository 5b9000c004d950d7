"""COCO 2017 with large-scale jitter (arXiv:2012.07177), 1024 x 1024, 8 images on each of 8 GPUs."""

_base_ = "coco_instance.py"

load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True, with_mask=True)]
pad = dict(type="Pad", size=(1024, 1024), pad_val=dict(img=(114, 114, 114)))
crop = dict(type="RandomCrop", crop_type="absolute", crop_size=(1024, 1024), recompute_bbox=True)
train_pipeline = [
    *load,
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=(1024, 1024), ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(**crop, allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)),
    pad,
    dict(type="PackDetInputs"),
]
test_meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
test_pipeline = [
    load[0],
    dict(type="Resize", scale=(1024, 1024), keep_ratio=True),
    pad,
    load[1],
    dict(type="PackDetInputs", meta_keys=test_meta),
]
train_dataloader = dict(
    batch_size=8, sampler=dict(type="InfiniteSampler", shuffle=True), dataset=dict(pipeline=train_pipeline)
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

"""ImageNet-1k in data/imagenet (train/CLASS/NAME.JPEG, val/CLASS/NAME.JPEG): 224 x 224, 128 on each of 8 GPUs."""

dataset = dict(type="TimmDataset", root="data/imagenet")
collate = dict(type="default_collate")
train_transform = dict(
    input_size=224,
    is_training=True,
    interpolation="bicubic",
    auto_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    re_prob=0.25,
    re_mode="pixel",
)
test_transform = dict(input_size=224, interpolation="bicubic", crop_pct=0.875)
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=collate,
    dataset=dict(**dataset, split="train", transform=train_transform),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=collate,
    dataset=dict(**dataset, split="validation", transform=test_transform),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="TopAccuracy", topk=(1, 5))
test_evaluator = val_evaluator

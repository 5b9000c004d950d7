"""A classifier of 1000 classes with label smoothing, Mixup and CutMix; ``variant`` and drop path are to be added."""

model = dict(
    type="VMambaClassifier",
    num_classes=1000,
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch"),
)

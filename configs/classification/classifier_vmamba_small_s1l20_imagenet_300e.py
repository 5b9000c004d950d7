"""VMamba-S (s1l20) on ImageNet-1k, 300 epochs.

    vmamba train configs/classification/classifier_vmamba_small_s1l20_imagenet_300e.py
    tools/dist_train.sh configs/classification/classifier_vmamba_small_s1l20_imagenet_300e.py 8

Hardware: 8 GPUs, 128 images each; published with --amp.
Expected: top-1 83.3.
Source: VMamba's README (github.com/MzeroMiko/VMamba).
Parameters of the whole network: 49,012,840 published.
"""

_base_ = [
    "../_base_/models/classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/classification_300e.py",
]
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
model = dict(variant="vmamba_small_s1l20", drop_path_rate=0.3)

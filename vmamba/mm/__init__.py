"""The zoo's backbones in OpenMMLab's toolboxes (mmdet, mmseg, mmpretrain ...), through mmengine's root registry.

A configuration needs one line, ``custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)``. Then it
can have ``backbone=dict(type="VMambaBackbone", variant="vmamba_tiny_s1l8")`` and, in the optimiser wrapper,
``constructor="VMambaOptimWrapperConstructor"``. ``import vmamba`` alone never imports anything of OpenMMLab.
"""

try:
    import mmengine  # noqa: F401
except ImportError as error:
    advice = "install the extra 'mm' of vmamba (make mm in a checkout); vmamba doctor says what is missing"
    raise ImportError(f"vmamba.mm needs mmengine: {error}; {advice}") from error

from vmamba.mm import complexity, foreign, history, image_folder, layers, official, saving
from vmamba.mm.accuracy import TopAccuracy
from vmamba.mm.average import VMambaEMAHook
from vmamba.mm.backbone import VMambaBackbone
from vmamba.mm.classifier import VMambaClassifier
from vmamba.mm.operators import DetectorOperatorsHook
from vmamba.mm.readable import LoadReadable
from vmamba.mm.repeatable import MeanLossHook, NumberedSampler, SeedByIterationHook, SeedBySample
from vmamba.mm.saving import WholeCheckpointHook
from vmamba.mm.schedule import VMambaOptimWrapperConstructor
from vmamba.mm.sharding import BlockwiseFSDP
from vmamba.mm.transposed_fpn import TransposedFPN

__all__ = [
    "BlockwiseFSDP",
    "DetectorOperatorsHook",
    "LoadReadable",
    "MeanLossHook",
    "NumberedSampler",
    "SeedByIterationHook",
    "SeedBySample",
    "TopAccuracy",
    "TransposedFPN",
    "VMambaBackbone",
    "VMambaClassifier",
    "VMambaEMAHook",
    "VMambaOptimWrapperConstructor",
    "WholeCheckpointHook",
    "image_folder",
]

complexity.register()
foreign.register()
history.register()
layers.register()
official.register()
saving.register()

"""FSDP for networks with our backbones: what it shares out layer by layer."""

import re
from functools import partial
from typing import Any

import torch
from mmengine.model.wrappers import MMFullyShardedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

BLOCK = re.compile(r"(^|\.)blocks\.\d+$")


@MODEL_WRAPPERS.register_module()
class BlockwiseFSDP(MMFullyShardedDataParallel):
    """Gathers the weights of one block of the backbone at a time, and everything else, heads too, once for a step.

    PyTorch's policy by size would also wrap containers, which are asked for their length, and heads, which OpenMMLab
    calls by other names than ``forward``; neither works. In a configuration::

        strategy = dict(type="FSDPStrategy", model_wrapper=dict(type="BlockwiseFSDP"))

    Args:
        module: a detector or segmentor.
        options: those of ``torch.distributed.fsdp.FullyShardedDataParallel``, but for ``auto_wrap_policy``.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        blocks = {child for name, child in module.named_modules() if BLOCK.search(name)}
        policy = partial(lambda_auto_wrap_policy, lambda_fn=blocks.__contains__)
        if not torch.cuda.is_available():
            options["device_id"] = torch.device("cpu")  # processes over gloo; mmengine gives the number of a GPU
        super().__init__(module, **{"use_orig_params": True, **options, "auto_wrap_policy": policy})

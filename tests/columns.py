"""What columns of blocks compute on the way, under the names of golden files."""

import torch
from torch import Tensor

from vmamba.columnar import Columnar, ColumnBlock


@torch.no_grad()
def outputs(model: Columnar, image: Tensor) -> dict[str, Tensor]:
    """Patches, tokens, each block's output (hidden) and the stream before it (residual), features, logits."""
    found: dict[str, Tensor] = {}
    blocks = [module for module in model.modules() if isinstance(module, ColumnBlock)]

    def keep(*names):
        def hook(module, inputs, result):
            found.update(zip(names, result if isinstance(result, tuple) else (result,), strict=True))

        return hook

    hooks = [
        block.register_forward_hook(keep(f"layer{i}.hidden", f"layer{i}.residual")) for i, block in enumerate(blocks)
    ]
    hooks.append(model.stem.register_forward_hook(keep("tokens", "grid")))
    hooks.append(model.stem.proj.register_forward_hook(keep("patch_embed")))
    hooks.append(blocks[0].norm.register_forward_hook(keep("layer0.norm")))
    features = model.forward_features(image)
    for hook in hooks:
        hook.remove()
    found["patch_embed"] = found["patch_embed"].flatten(2).mT
    return {**found, "features": model.forward_head(features, pre_logits=True), "logits": model.forward_head(features)}

"""Parts of networks against goldens: official weights for a single block, and what inner modules compute."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from tests import goldens
from vmamba.checkpoint import load_checkpoint


def load_block(block: nn.Module, case: Mapping, keys: Sequence, prefix: str = "") -> nn.Module:
    """``block`` in float64 and eval mode with the weights of ``case``, whose names lack ``prefix``."""
    root = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    root.official_keys = keys
    state = {f"blocks.0.{prefix}{key}": value for key, value in goldens.fill_state(case).items()}
    load_checkpoint(root.double().eval(), state)
    return block


@torch.no_grad()
def probe(run: Callable[[], object], modules: Mapping[str, nn.Module]) -> dict[str, list[Tensor]]:
    """What each of ``modules`` returns during ``run()``, call by call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda module, inputs, y, calls=seen[name]: calls.append(y))
            stack.callback(hook.remove)
        run()
    return seen

"""Parameter groups for mmengine's optimisers: what weight decay spares, and learning rates that fall with depth."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

OPTIONS = ("decay_rate", "custom_keys", "spare_vectors")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # what PyTorch puts into names of parameters


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VMambaOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Groups the parameters of any model whose backbone is a ``VMambaBackbone`` (or keeps its protocol).

    Weight decay spares what a module's ``no_weight_decay()`` names (state matrices, skips, step-size biases, positions)
    and, unless told otherwise, vectors: norms and biases. Names and layers are those that the network itself gives to
    timm; no rule is written twice. Models that FSDP shards (``use_orig_params=True``) have the same groups.
    ``paramwise_cfg`` may have

    - ``decay_rate``: the learning rate of a layer over that of the next, 1 by default: in (0, 1]. What comes after the
      backbone learns at the full rate (BEiT, arXiv:2106.08254);
    - ``custom_keys``: factors for parameters by a part of their names, ``{"decode_head": dict(lr_mult=10)}``, with
      ``lr_mult`` and ``decay_mult``; of several parts, the longest counts;
    - ``spare_vectors``: False to let norms and biases decay too.

    Raises:
        TypeError: ``paramwise_cfg`` has another field; ValueError: ``decay_rate`` is out of range, or there is no
        network that tells its layers.
    """

    def _validate_cfg(self) -> None:
        """Check the fields; give one a value, since mmengine makes no groups of an empty ``paramwise_cfg``."""
        self.paramwise_cfg = {"decay_rate": 1.0, **self.paramwise_cfg}
        unknown = sorted(set(self.paramwise_cfg) - set(OPTIONS))
        if unknown:
            raise TypeError(f"paramwise_cfg has no {', '.join(unknown)}; choose from {', '.join(OPTIONS)}")
        rate = self.paramwise_cfg["decay_rate"]
        if not 0 < rate <= 1:
            raise ValueError(f"decay_rate must be in (0, 1], got {rate}")

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Append a group per learning rate and weight decay to ``params``."""
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        with _whole(module):
            spared, scales = self._spared(module), self._scales(module)
        for raw, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            name = _plain(raw)
            factors = self._factors(name)
            scale = scales.get(name, 1.0) * factors.get("lr_mult", 1.0)
            decay = 0.0 if name in spared else factors.get("decay_mult", 1.0)
            group = groups.setdefault((scale, decay), {"params": [], "param_names": [], "lr_scale": scale})
            group["params"].append(parameter)
            group["param_names"].append(name)
            if self.base_lr is not None:
                group["lr"] = self.base_lr * scale
            if self.base_wd is not None:
                group["weight_decay"] = self.base_wd * decay
        params.extend(groups.values())

    def _spared(self, model: nn.Module) -> set[str]:
        """Names of the parameters that do not decay."""
        named = {
            f"{prefix}{name}" for prefix, module in _with(model, "no_weight_decay") for name in module.no_weight_decay()
        }
        if self.paramwise_cfg.get("spare_vectors", True):
            named |= {name for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(".bias")}
        return {_plain(name) for name in named}

    def _scales(self, model: nn.Module) -> dict[str, float]:
        """Factors on the learning rate of the backbone's parameters by name; empty if all layers learn alike."""
        rate = self.paramwise_cfg["decay_rate"]
        if rate == 1:
            return {}
        layered = _with(model, "get_layer_depth")
        if not layered:
            raise ValueError("decay_rate needs a network with get_layer_depth; take VMambaBackbone, or leave it out")
        scales = {}
        for prefix, module in layered:
            for name, _ in module.named_parameters():
                layer, depth = module.get_layer_depth(f"{prefix}{name}", prefix)
                scales[_plain(f"{prefix}{name}")] = rate ** (depth - 1 - layer)
        return scales

    def _factors(self, name: str) -> Mapping[str, float]:
        """What ``custom_keys`` says of a parameter."""
        keys = self.paramwise_cfg.get("custom_keys") or {}
        matching = sorted((key for key in keys if key in name), key=lambda key: (len(key), key))
        return keys[matching[-1]] if matching else {}


def _with(model: nn.Module, method: str) -> list[tuple[str, Any]]:
    """Outermost modules with ``method``, and the prefix of their parameters' names."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if callable(getattr(module, method, None)) and not any(prefix.startswith(outer) for outer, _ in found):
            found.append((prefix, module))
    return found


def _plain(name: str) -> str:
    """A parameter's name as if nothing were wrapped."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Inside it, parameters of a model that FSDP shards have their shapes; elsewhere they are flat and partly empty."""
    if not isinstance(model, FullyShardedDataParallel):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        yield

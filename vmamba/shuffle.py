"""Stochastic layer-wise shuffle: a regularisation of training for any network of the zoo (arXiv:2408.17081, ICML 2025).

In training, layer i of 0, 1, ..., n - 1 reads its pixels in a random order with probability rate * i / (n - 1), and its
results go back to where they came from: only the order in which its scans and convolutions see them is random. The
order is drawn anew for each layer and pass, one for the whole batch. Nothing is rescaled, no parameter or name changes,
and nothing remains at inference.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.backbone import Stage
from vmamba.columnar import Columnar
from vmamba.kernels.routes import Table, gather


def shuffle_layers(model: nn.Module, rate: float, *, layers: Sequence[nn.Module] | None = None) -> None:
    """Shuffle the layers of ``model`` in training, with probabilities that rise linearly from 0 to ``rate``.

    Works with gradient checkpointing (the recomputation draws the same order), DistributedDataParallel (each process
    draws its own) and ``torch.compile`` (call this before it); ``torch.manual_seed`` determines all orders. A second
    call sets other probabilities; ``rate=0`` ends the shuffle.

    Args:
        model: any network; its parameters, their names and its results in evaluation mode stay as they are.
        rate: probability of the last layer.
        layers: modules from pixels to as many pixels, (b, l, c) or (b, h, w, c), in the order in which they run; their
            tensors of other ranks, numbers and tuples are left alone. By default all blocks of the columns and stages
            in ``model``. Each becomes an instance of a class that derives from its own and from :class:`LayerShuffle`.

    Raises:
        ValueError: ``rate`` is not from 0 to 1, or ``model`` has no layers.

    >>> import vmamba
    >>> model = vmamba.create_model("vmamba_tiny_s1l8", depths=(1, 1), dim=16)
    >>> shuffle_layers(model, 0.5)
    >>> model.stages[1].blocks[0].shuffle_probability
    0.5
    """
    found: Sequence[Any] = layers_of(model) if layers is None else layers
    if not 0 <= rate <= 1:
        raise ValueError(f"the rate of the shuffle must lie from 0 to 1, got {rate}")
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks of the zoo to shuffle; name its layers: layers=[...]")
    for layer, probability in zip(found, calculate_drop_path_rates(rate, len(found)), strict=True):
        plain = _plain(type(layer))
        layer.__class__ = _shuffled(plain) if probability else plain
        layer.shuffle_probability = probability


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of all columns and stages in ``model``, in order."""
    owners = [module for module in model.modules() if isinstance(module, Columnar | Stage)]
    return [block for owner in owners for block in owner.blocks]


@register_notrace_module
class LayerShuffle(nn.Module):
    """What the class of a shuffled layer derives from, before the layer's own class.

    Attributes:
        shuffle_probability: of a random order in a forward pass; may be set anew at any time.
    """

    shuffle_probability: float

    def forward(self, *inputs: Any) -> Any:
        """What the layer makes of ``inputs``; in training perhaps in a random order, and put back.

        Raises:
            ValueError: no input is a map, or the maps among inputs and results differ in their number of pixels.
        """
        order = self._draw(inputs) if self.training else None
        if order is None:
            return super().forward(*inputs)
        result = super().forward(*_moved(inputs, order))
        back = Table(order.inverse, order.routes, padded=False, once=True)
        return _moved(result, back) if isinstance(result, tuple) else _moved((result,), back)[0]

    def _draw(self, inputs: tuple) -> Table | None:
        """A random order with the layer's probability, else None (compiled: else the order of the map).

        Whether there is one is decided on the CPU, so that a layer which keeps its order costs nothing and nothing
        waits for a GPU; compiled code has no such branch and decides on the device.
        """
        x = next((x for x in inputs if _is_map(x)), None)
        if x is None:
            raise ValueError(f"{type(self).__name__} needs a map (b, l, c) or (b, h, w, c) to shuffle; got none")
        compiled = torch.compiler.is_compiling()
        drawn = torch.rand((), device=x.device if compiled else "cpu") < self.shuffle_probability
        if not compiled and not drawn:
            return None
        length = math.prod(x.shape[1:-1])
        steps = torch.arange(length, device=x.device)
        order = torch.randperm(length, device=x.device)
        order = torch.where(drawn, order, steps) if compiled else order
        inverse = steps.scatter(0, order, steps)
        return Table(order.int()[None], inverse.int()[None], padded=False, once=True)

    def __reduce__(self):
        return _restored, (_plain(type(self)),), self.__dict__


@cache
def _shuffled(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Shuffled{plain.__name__}", (LayerShuffle, plain), {"__module__": plain.__module__})


def _plain(cls: type[nn.Module]) -> type[nn.Module]:
    return cls.__bases__[1] if issubclass(cls, LayerShuffle) else cls


def _restored(plain: type[nn.Module]) -> nn.Module:
    cls = _shuffled(plain)
    return cls.__new__(cls)


def _is_map(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 2


def _moved(values: tuple, order: Table) -> tuple:
    """``values`` with the pixels of maps (b, ..., c) in the given order."""
    length = order.routes.shape[1]
    wrong = [x.shape for x in values if _is_map(x) and math.prod(x.shape[1:-1]) != length]
    if wrong:
        raise ValueError(f"a layer that is shuffled keeps the number of pixels, {length}; got {tuple(wrong[0])}")
    return tuple(gather(x.flatten(1, -2), order).reshape(x.shape) if _is_map(x) else x for x in values)

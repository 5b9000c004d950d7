"""A training step's forward and backward as a CUDA graph, so that a GPU need not wait for the host that launches them.

Patches have one shape, so that every step launches the same kernels; several hundred to a few thousand of them take a
host longer to launch, one by one, than a GPU takes to run them.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from vmamba.narrow import watched

WARMUP = 3  # steps launched one by one, in which libraries choose their kernels; the last shows whether the host waits

Loss = Callable[..., Tensor]
Parameters = Mapping[str, Tensor]
Gradients = Sequence[Tensor | None]


class Captured:
    """``loss(*inputs)`` with its gradients: on a GPU replayed from a graph after the first steps, else as it is.

    The numbers are the same: a graph has the kernels of the steps before it, and draws what they would draw. Other
    shapes, networks with hooks, losses that wait for the GPU or take more than half of its memory, and those of float16
    under autocast, whose gradients need a scaled loss, are computed as they are.

    Args:
        loss: of tensors, to a number; it has no other inputs that change. network: what it trains.
    """

    def __init__(self, loss: Loss, network: nn.Module) -> None:
        self.loss, self.network = loss, network
        self.seen, self.fits = 0, True
        self.graph: Graph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss, whose ``backward`` gives the gradients of the network's parameters."""
        if not (self.fits and torch.is_grad_enabled() and all(x.is_cuda for x in inputs)):
            return self.loss(*inputs)
        if self.graph is not None:
            return self.graph(*inputs) if self.graph.takes(*inputs) else self.loss(*inputs)
        self.seen += 1
        if self.seen < WARMUP:
            return self.loss(*inputs)
        objective = Objective(self.loss, self.network)
        if self.seen == WARMUP:
            return self._rehearsed(objective, *inputs)
        self.graph = _made(objective, inputs) if _roomy(inputs[0].device) else None
        self.fits = self.graph is not None
        return self.loss(*inputs) if self.graph is None else self.graph(*inputs)

    def _rehearsed(self, objective: "Objective", *inputs: Tensor) -> Tensor:
        """A step in which nothing may wait for the GPU; where something does, there will be no graph."""
        scaled = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is torch.float16
        draws, learned = torch.cuda.get_rng_state(inputs[0].device), [*objective.learned.values()]
        self.fits = not scaled and not watched(*self.network.modules())
        try:
            if self.fits:
                with _Hurried():
                    total, grads = objective.with_gradients(inputs, learned)
                own, beside = grads[: len(learned)], grads[len(learned) :]
                if all(g is None for g in beside):  # parameters are reached by their names alone
                    return _Known.apply(total, own, *learned)
        except RuntimeError:
            pass
        self.fits = False
        torch.cuda.set_rng_state(draws, inputs[0].device)
        return self.loss(*inputs)


class _Hurried:
    """Where the host waits for the GPU, that is a RuntimeError."""

    def __enter__(self) -> None:
        self.mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it does not find everything
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode(self.mode)


def _roomy(device: torch.device) -> bool:
    """Whether what was needed so far fits twice: a graph keeps its memory, and validation has to run beside it."""
    return 2 * torch.cuda.max_memory_allocated(device) <= torch.cuda.get_device_properties(device).total_memory


def _made(objective: "Objective", inputs: Sequence[Tensor]) -> "Graph | None":
    """The graph; None where memory does not suffice (it keeps its own) or something cannot be captured."""
    device = inputs[0].device
    stream, draws = torch.cuda.current_stream(device), torch.cuda.default_generators[device.index]
    spare = draws.clone_state()
    try:
        return Graph(objective, inputs)
    except RuntimeError as error:  # the stream, and the generator, may still be those of the capture
        torch.cuda.set_stream(stream)
        draws.graphsafe_set_state(spare)
        warnings.warn(f"no CUDA graph, kernels are launched one by one: {str(error).splitlines()[0]}", stacklevel=2)
        return None


class Objective(nn.Module):
    """A loss as a function of the parameters of the network that it trains.

    Args:
        loss, network: as of :class:`Captured`.
    """

    def __init__(self, loss: Loss, network: nn.Module) -> None:
        super().__init__()
        self.network, self._loss = network, loss
        self.learned: Parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, *inputs: Tensor) -> Tensor:
        """A number."""
        return self._loss(*inputs)

    def with_gradients(self, inputs: Sequence[Tensor], beside: Sequence[Tensor] = ()) -> tuple[Tensor, Gradients]:
        """The loss and its gradients with respect to ``learned``, and to tensors ``beside``.

        Nothing is shared with other steps: autograd's nodes of the parameters would bring their streams along, and
        autocast's copies of weights would grow old.
        """
        kind = inputs[0].device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        own = {name: p.detach().requires_grad_() for name, p in self.learned.items()}
        with torch.autocast(kind, dtype, enabled, cache_enabled=False):
            total = cast(Tensor, functional_call(self, own, tuple(inputs)))
        return total.detach(), torch.autograd.grad(total, [*own.values(), *beside], allow_unused=True)


class Graph:
    """A loss and its gradients, captured for inputs like these.

    Args:
        objective: was computed a few times before. inputs: the shapes and types that it will take.
    """

    def __init__(self, objective: Objective, inputs: Sequence[Tensor]) -> None:
        self.learned, self.inputs = [*objective.learned.values()], [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # other threads, as the one that pins batches, may go on meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.known = objective.with_gradients(self.inputs)

    def takes(self, *inputs: Tensor) -> bool:
        """Whether they are of the shapes and types that were captured."""
        return [(x.shape, x.dtype) for x in inputs] == [(x.shape, x.dtype) for x in self.inputs]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss of other inputs."""
        torch._foreach_copy_(self.inputs, list(inputs))
        self._graph.replay()
        return _Known.apply(*self.known, *self.learned)


class _Known(torch.autograd.Function):
    """A loss whose gradients were computed with it."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, grads: Gradients, *learned: Tensor) -> Tensor:
        ctx.grads = grads
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        there = [g for g in ctx.grads if g is not None]
        scaled = iter(torch._foreach_mul(there, factor))  # of their own: a replay writes over the others
        return None, None, *(None if g is None else next(scaled) for g in ctx.grads)

"""Runs that can be repeated: from a checkpoint, on another number of processes or of workers, with the same loss.

mmengine seeds a run when it starts, so what is random in iteration 1000 depends on everything that came before it. Here
it depends on the run's seed and on the number of the sample or of the iteration alone. In a configuration:

    train_dataloader = dict(sampler=dict(type="NumberedSampler", shuffle=True), dataset=dict(pipeline=[
        dict(type="SeedBySample"), dict(type="LoadImageFromFile"), ...]))
    custom_hooks = [dict(type="SeedByIterationHook"), dict(type="MeanLossHook")]
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS, TRANSFORMS

BITS = 2**32  # seeds of NumPy are below


class Numbered(int):
    """The index of a sample that knows the run's seed and how many samples the run, on all processes, took before."""

    seed: int
    number: int


@DATA_SAMPLERS.register_module()
class NumberedSampler(InfiniteSampler):
    """mmengine's InfiniteSampler, whose indices are ``Numbered``; for loops that count iterations."""

    def _infinite_indices(self) -> Iterator[int]:
        for number, index in enumerate(super()._infinite_indices()):
            numbered = Numbered(index)
            numbered.seed, numbered.number = self.seed, number
            yield numbered


@TRANSFORMS.register_module()
class SeedBySample:
    """First transform of a pipeline: those after it draw what they would for this sample in any other run."""

    def __call__(self, results: dict) -> dict:
        """Seeds Python's and NumPy's generators, from which OpenMMLab's transforms draw; ``results`` stays as it is.

        Raises:
            TypeError: the sample is not from a ``NumberedSampler``.
        """
        index = results.get("sample_idx")
        if not isinstance(index, Numbered):
            raise TypeError(f"SeedBySample needs sampler=dict(type='NumberedSampler'); got the index {index!r}")
        seed = _mixed(index.seed, index.number)
        random.seed(seed)
        np.random.seed(seed)
        return results

    def __repr__(self) -> str:
        return "SeedBySample()"


@HOOKS.register_module()
class SeedByIterationHook(Hook):
    """What a network draws (stochastic depth, dropout, regions to learn from) follows from seed, iteration, process."""

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seeds PyTorch's generators of all devices."""
        torch.manual_seed(_mixed(runner.seed, runner.iter, runner.rank))


@HOOKS.register_module()
class MeanLossHook(Hook):
    """Logs show the means of the losses over all processes, not those of the first process."""

    priority = "HIGHEST"  # before RuntimeInfoHook takes the values

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        """Replaces the scalars of ``outputs``."""
        scalars = {key: value for key, value in (outputs or {}).items() if torch.is_tensor(value) and value.ndim == 0}
        if get_world_size() == 1 or not scalars:
            return
        means = torch.stack([value.detach().float() for value in scalars.values()])
        all_reduce(means, "mean")
        (outputs or {}).update(zip(scalars, means, strict=True))


def _mixed(*numbers: int | None) -> int:
    """One seed from several numbers, without visible relation to those from their neighbours."""
    return int(np.random.SeedSequence([(number or 0) % BITS for number in numbers]).generate_state(1)[0])

"""Training steps on patches that are there already: networks and nnU-Net's own take turns."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vmamba import memory
from vmamba.benchmark import Job, Work
from vmamba.clock import Step
from vmamba.medical.benchmark import Example, Setup, baseline, build, supervise
from vmamba.medical.captured import Captured
from vmamba.medical.fold_module import CLIP, OPTIMISERS, FoldSettings
from vmamba.medical.losses import deep_loss
from vmamba.medical.networks import logits
from vmamba.medical.window import CAST

KEY = ("name", "patch", "batch", "precision")
ROUND = {"cuda": 4, "cpu": 1}  # steps that are timed together, so that the host can run ahead as it does in training


def points(setups: Mapping[str, Setup], precisions: Sequence[str], device: torch.device) -> list[list[Job]]:
    """For each setup and precision the jobs that take turns, nnU-Net's first: it is what the others are compared to."""
    found = []
    for setup in dict.fromkeys(setups.values()):
        names = [baseline(), *(name for name, its in setups.items() if its == setup)]
        found += [[_job(name, setup, precision, device) for name in names] for precision in precisions]
    return found


def _job(name: str, setup: Setup, precision: str, device: torch.device) -> Job:
    facts = {"name": name, "patch": setup.size, "batch": setup.batch, "precision": precision, "setup": setup.source}
    facts["steps"] = ROUND[device.type]
    return Job(facts, partial(_make, name, setup, precision, device))


def _make(name: str, setup: Setup, precision: str, device: torch.device) -> Work:
    torch.manual_seed(0)
    network = build(name, setup).to(device).train()
    example = Example.make(setup, device)
    step = training_step(network, example, precision)
    weights = memory.size_of(network.parameters())

    def steps() -> None:
        for _ in range(ROUND[device.type]):
            step()

    held = 3 * weights + memory.size_of([*network.buffers(), example.image, example.label])  # gradients and momentum
    return Work(steps, held, lambda _: 0)


def training_step(network: nn.Module, example: Example, precision: str) -> Step:
    """One iteration of nnU-Net's recipe as training runs it: forward, loss, backward, clipping, SGD."""
    settings, half, kind = FoldSettings(), CAST[precision], example.image.device.type
    optimizer = OPTIMISERS[settings.optimizer](network.parameters(), settings.lr, settings.weight_decay)
    deep = supervise(network, True)

    def loss_of(image: Tensor, label: Tensor) -> Tensor:
        maps = network(image) if deep else logits(network, image)
        return deep_loss(example.loss, maps, label)

    captured = Captured(loss_of, network)

    def step() -> None:
        with torch.autocast(kind, half, enabled=half != torch.float32):
            loss = captured(example.image, example.label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()

    return step

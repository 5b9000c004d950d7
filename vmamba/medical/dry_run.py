"""What a training would do, said before it: cases, patch, batch, network, and the memory that a step needs at least."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.medical.fold_module import FoldSettings
from vmamba.medical.folds import fold_cases
from vmamba.medical.jobs import Job
from vmamba.medical.module import build_network
from vmamba.medical.networks import build, logits, raise_patch
from vmamba.medical.prepare import prepare
from vmamba.medical.recipes import RECIPES
from vmamba.medical.spec import Settings

COPIES = {"sgd": 3, "adamw": 4}  # of the weights: themselves, gradients, what the optimiser keeps
GIB = 2**30


def describe_run(settings: Settings) -> str:
    """The plan of a training on a folder, after reading and checking all of its data; nothing is written."""
    prepared, chosen = prepare(settings), RECIPES[settings.recipe]
    steps = max(len(prepared.train) // settings.batch_size, 1)
    with torch.device("meta"):
        network = build_network(prepared.spec)
    cosine = f"down and up every {chosen.half_period} epochs" if chosen.half_period else "once down"
    lines = [
        *prepared.notes,
        f"recipe {settings.recipe}: {chosen.words}",
        f"loss {chosen.loss}; AdamW {settings.lr:g}, weight decay {settings.weight_decay:g}; cosine {cosine}, to "
        f"{settings.min_lr:g}; augmentation {settings.augmentation}; normalisation {settings.normalisation}",
        f"best.ckpt by {chosen.best}; {settings.epochs} epochs of {steps} step(s)",
    ]
    batch = settings.batch_size, prepared.spec.channels, *prepared.spec.patch
    return "\n".join([*lines, network_line(settings.model, network, batch, COPIES["adamw"])])


def describe_fold(job: Job, fold: str, settings: FoldSettings) -> str:
    """The plan of one fold of a data set in nnU-Net's layout; nothing is written."""
    c = job.configuration
    names = [case.name for case in job.dataset.cases()]
    train, val = fold_cases(job.preprocessed / "splits_final.json", names, fold, write=False)
    with torch.device("meta"):
        network = build(settings.trainer, c, len(job.dataset.channels), job.dataset.labels.outputs, settings.network)
    patch = raise_patch(network, tuple(settings.patch or c.patch))
    batch = settings.batch_size or c.batch, len(job.dataset.channels), *patch
    lines = [
        f"{job.folder / f'fold_{fold}'}: {len(train)} case(s) to train, {len(val)} to validate",
        f"{settings.optimizer} {settings.lr:g}, weight decay {settings.weight_decay:g}; "
        f"{settings.epochs} epochs of {settings.iterations} + {settings.val_iterations} steps",
    ]
    return "\n".join([*lines, network_line(settings.trainer, network, batch, COPIES[settings.optimizer])])


def network_line(name: str, network: nn.Module, batch: Sequence[int], copies: int) -> str:
    """Batch, patch, parameters and memory of a ``network`` on the meta device, for batches (b, c, *patch)."""
    parameters = sum(p.numel() for p in network.parameters())
    need = (copies * 4 * parameters + kept_bytes(network, batch)) / GIB
    patch = " x ".join(map(str, batch[2:]))
    encoder: Any = getattr(network, "encoder", ())
    levels = getattr(encoder, "strides", encoder)
    stages = len(levels) if hasattr(levels, "__len__") else 0
    shape = f", {stages} stages" if stages else ""
    return (
        f"{name}{shape}, {parameters / 1e6:.2f} M parameters; batch {batch[0]}, {batch[1]} channel(s), patches of "
        f"{patch}: at least {need:.2f} GiB in 32 bits, less in 16 (weights, gradients, optimiser, activations)"
    )


def kept_bytes(network: nn.Module, batch: Sequence[int]) -> int:
    """Bytes that a forward pass of a batch keeps for the backward pass, counted on the meta device."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits(network.train(), torch.empty(*batch, device="meta"))
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    return sum(math.prod(x.shape) * x.element_size() for key, x in kept.items() if key not in own)

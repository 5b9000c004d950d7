"""The networks of ``vmamba benchmark models``, ours and timm's, as jobs to measure."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vmamba import create_model, list_models, memory
from vmamba.benchmark import Job, Work
from vmamba.errors import UserError

RIVALS = ("vmamba_tiny_s1l8", "convnext_tiny", "swin_tiny_patch4_window7_224")
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TASKS = ("inference", "training")
PIXELS = {"cuda": 128 * 224**2, "cpu": 4 * 224**2}  # in a batch that is found automatically
KEY = ("name", "task", "size")


@dataclass(frozen=True)
class Setting:
    """What holds for every row of a run; ``compile`` is a mode of ``torch.compile``, empty for eager."""

    device: torch.device
    batch: int | None = None
    precision: str = "fp32"
    compile: str = ""
    channels_last: bool = False

    def facts(self) -> dict[str, str]:
        """In words."""
        cast = " by autocast, float32 weights" if self.precision in ("bf16", "fp16") else ""
        most = f"auto: up to {PIXELS[self.device.type] / 1e6:.1f} million pixels, halved where memory does not suffice"
        return {
            "precision": self.precision + cast,
            "layout": "weights and images channels-last" if self.channels_last else "weights and images contiguous",
            "mode": f"torch.compile, mode {self.compile}" if self.compile else "eager",
            "batch": most if self.batch is None else str(self.batch),
            "training": "forward and backward without an optimiser, drop path as published",
            "moved": memory.MOVED_COMPILED if self.compile else memory.MOVED,
        }


def points(names: Sequence[str], sizes: Sequence[int], tasks: Sequence[str], setting: Setting) -> Iterator[list[Job]]:
    """For each size and task the jobs that take turns.

    Raises:
        UserError: a name is neither ours nor timm's.
    """
    for name in names:
        _check(name)
    for size in sizes:
        pixels = PIXELS[setting.device.type] // size**2
        batch = setting.batch or 1 << max(pixels.bit_length() - 1, 0)
        yield from ([_job(name, task, size, batch, setting) for name in names] for task in tasks)


def _check(name: str) -> None:
    if timm.is_model(name) or name.removesuffix("_backbone") in list_models():
        return
    near = difflib.get_close_matches(name, [*list_models(), *timm.list_models()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "vmamba list shows ours, timm.list_models() timm's"
    raise UserError(f"unknown network {name!r}; {hint}")


def _job(name: str, task: str, size: int, batch: int, setting: Setting) -> Job:
    def smaller() -> Job | None:
        return _job(name, task, size, batch // 2, setting) if setting.batch is None and batch > 1 else None

    facts = {"name": name, "task": task, "size": size, "batch": batch}
    return Job(facts, partial(_make, name, task, size, batch, setting), smaller)


def _make(name: str, task: str, size: int, batch: int, setting: Setting) -> Work:
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    model = build(name, size).to(setting.device).train(task == "training")
    model = model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    channels: Any = getattr(model, "in_chans", 3)
    images = torch.randn(batch, channels, size, size, device=setting.device).to(memory_format=layout)
    mode = setting.compile
    run: Callable[..., Any] = torch.compile(model, mode=mode, dynamic=False) if mode else model
    held = memory.size_of([*model.parameters(), *model.buffers(), images])
    count = memory.moved_compiled if mode else memory.moved
    return Work(partial(_STEPS[task], run, model, images, setting), held, count)


def build(name: str, size: int) -> nn.Module:
    """A network with random weights for images of size x size: ours by :func:`vmamba.create_model`, else timm's."""
    if name.removesuffix("_backbone") in list_models():
        model = create_model(name)
        resize: Any = getattr(model, "set_input_size", None)  # networks with positions for each pixel of a grid
        if resize is not None:
            resize(size)
        return model
    published = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"img_size": size} if published and published.fixed_input_size else {}
    return timm.create_model(name, **options)


def _outputs(run: Callable[..., Any], images: Tensor, setting: Setting) -> list[Tensor]:
    dtype = PRECISIONS[setting.precision]
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return [leaf for leaf in tree_leaves(run(images)) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _infer(run: Callable[..., Any], model: nn.Module, images: Tensor, setting: Setting) -> list[Tensor]:
    return _outputs(run, images, setting)


def _train(run: Callable[..., Any], model: nn.Module, images: Tensor, setting: Setting) -> None:
    torch.stack([output.float().square().mean() for output in _outputs(run, images, setting)]).sum().backward()
    model.zero_grad(set_to_none=True)


_STEPS: dict[str, Callable[..., Any]] = dict(zip(TASKS, (_infer, _train), strict=True))

"""Prediction of one large volume, by the code behind ``vmamba medseg predict``: from its file to the mask on disk."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from vmamba import memory
from vmamba.benchmark import Row
from vmamba.medical.benchmark import Setup, build, supervise
from vmamba.medical.fold_predict import Wish, predict_folder
from vmamba.medical.labelset import classes
from vmamba.medical.model_folder import ModelFolder, Trained
from vmamba.medical.plan import parse
from vmamba.medical.topology import architecture, topology
from vmamba.medical.window import Window, volume_logits

KEY = ("name", "patch", "volume", "precision", "mirrors")
SPACING = (2.5, 0.8, 0.8)  # mm; the plan's is the same, so that nothing is resampled
ENDING = ".nii.gz"


def facts(name: str, setup: Setup, volume: Sequence[int], window: Window) -> Row:
    """What is known beforehand; ``batch`` windows go through the network at once."""
    return {
        "name": name,
        "patch": setup.size,
        "batch": window.windows(setup.patch),
        "volume": " x ".join(map(str, volume)),
        "precision": window.precision,
        "mirrors": 2 ** len(setup.patch) if window.mirror else 1,
        "setup": setup.source,
        "windows": count(volume, setup.patch, window.step),
        "failure": None,
    }


def measure(name: str, setup: Setup, volume: Sequence[int], window: Window, repeat: int) -> list[Row]:
    """Seconds for one volume (z, y, x) of one channel, each the least of ``repeat`` after a warm-up.

    ``windows_s`` is the network's part, from voxels in main memory to logits; ``whole_s`` all of it, from the file to
    the mask. ``peak_bytes`` of device memory (or of the process, on a CPU) in the whole, weights among them.
    """
    network = build(name, replace(setup, channels=1)).eval().to(window.device)
    supervise(network, False)
    trained = Trained(network, setup.patch, tuple(range(len(setup.patch))))
    draw = np.random.default_rng(0)
    data = torch.from_numpy(draw.standard_normal((1, *volume), np.float32))
    _warm_up(trained, data, window)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "images", Path(folder) / "masks"
        source.mkdir()
        _write(source / f"case_0000{ENDING}", data)
        model, wish = _model(Path(folder), setup), Wish(overwrite=True, progress=False)
        whole = partial(predict_folder, source, output, model, [trained], window, wish)
        windows = min(_seconds(partial(volume_logits, [trained], data, window), window.device) for _ in range(repeat))
        times: list[float] = []
        grown = memory.peak(lambda: times.extend(_seconds(whole, window.device) for _ in range(repeat)), window.device)
    held = memory.size_of([*network.parameters(), *network.buffers()])
    peak = None if grown is None else held + grown
    return [{**facts(name, setup, volume, window), "windows_s": windows, "whole_s": min(times), "peak_bytes": peak}]


def count(volume: Sequence[int], patch: Sequence[int], step: float) -> int:
    """Windows that cover a volume (z, y, x), each seen once for every mirror; a 2D network has them in every slice."""
    places = [
        ceil(max(n - p, 0) / max(int(p * step), 1)) + 1 for n, p in zip(volume[-len(patch) :], patch, strict=True)
    ]
    return prod(places) * (volume[0] if len(patch) == 2 else 1)


def _warm_up(trained: Trained, data: torch.Tensor, window: Window) -> None:
    """One full batch of windows and one that is not full, without mirrors: kernels are compiled and chosen."""
    patch, once = trained.patch, replace(window, mirror=False)
    slices = window.windows(patch)
    sides = [slices, *patch] if len(patch) == 2 else [*patch[:-1], patch[-1] * (slices + 1) // 2]
    for part in (sides, [1, *patch] if len(patch) == 2 else patch):
        volume_logits([trained], data[(slice(None), *(slice(n) for n in part))], once)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _write(path: Path, data: torch.Tensor) -> None:
    """Noise between -1000 and 1000, as a CT's numbers, in a file (x, y, z)."""
    voxels = (data[0] * 250).clamp(-1000, 1000).numpy().astype(np.int16).T
    image = nibabel.Nifti1Image(voxels, np.diag([*SPACING[::-1], 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _model(folder: Path, setup: Setup) -> ModelFolder:
    """What a trained configuration's folder says, with CT's normalisation and the volume's own spacing."""
    axes = len(setup.patch)
    spacing = SPACING[3 - axes :]
    c = {
        "data_identifier": "benchmark",
        "patch_size": list(setup.patch),
        "batch_size": setup.batch,
        "spacing": list(spacing),
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "architecture": architecture(topology(spacing, setup.patch)),
    }
    foreground = {"mean": 0.0, "std": 250.0, "percentile_00_5": -750.0, "percentile_99_5": 750.0}
    plans = {
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": foreground},
    }
    dataset = {"channel_names": {"0": "CT"}, "file_ending": ENDING}
    return ModelFolder(folder, plans, dataset, classes(setup.classes - 1), parse("benchmark", c))

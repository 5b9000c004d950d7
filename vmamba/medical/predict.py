"""Prediction: files in, masks of the same geometry out; finished ones are kept, so that a stopped run goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from vmamba.device import choose_device
from vmamba.errors import UserError
from vmamba.medical.cases import Case, ending, input_cases, is_array, is_volume
from vmamba.medical.inference import infer
from vmamba.medical.layouts import find_layout
from vmamba.medical.module import build_network, class_probabilities, plain
from vmamba.medical.plots import save_overlay
from vmamba.medical.readers import read_image, restore, write_mask
from vmamba.medical.resize import RESIZERS, nearest
from vmamba.medical.runs import load_checkpoint
from vmamba.medical.transforms import normalise
from vmamba.medical.written import complete, save_probabilities, say_kept
from vmamba.safety import only_writer, replacing


@dataclass
class Output:
    """What prediction writes beside the masks, and whether existing masks are replaced."""

    probabilities: bool = False
    overlay: bool = False
    overwrite: bool = False
    progress: bool = True


class Predictor:
    """A trained network with all that its inputs need."""

    def __init__(self, checkpoint: Path, device: str = "auto", batch_size: int = 8) -> None:
        self.spec, state = load_checkpoint(checkpoint)
        self.device = choose_device(device)
        self.batch_size = batch_size
        self.network: nn.Module = build_network(self.spec)
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{checkpoint}: its weights do not fit {self.spec.model!r} of this version ({reason})"
            ) from error
        self.network.to(self.device).eval()

    @torch.inference_mode()
    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Softmax (k, s, h, w) float32 of raw slices (s, c, h, w)."""
        spec, whole = self.spec, image.shape[2:]
        ready = normalise(image, spec.normalisation, spec.statistics)
        stack = torch.from_numpy(RESIZERS[spec.resize].image(ready, spec.size) if spec.size else ready)
        out = np.empty((len(self.spec.values), len(stack), *stack.shape[2:]), np.float32)
        for start in range(0, len(stack), self.batch_size):
            part = stack[start : start + self.batch_size].to(self.device)
            maps = infer(plain(self.network, spec), part, spec.patch, self.batch_size)
            out[:, start : start + len(part)] = class_probabilities(maps).transpose(0, 1).cpu().numpy()
        return nearest(out, whole) if spec.size else out


def predict(
    inputs: Sequence[Path], checkpoint: Path, output: Path, *, to: Output | None = None, device: str = "auto"
) -> list[Path]:
    """Segments every case of ``inputs`` into ``output``/NAME.ext; returns the masks' paths. UserError for bad input."""
    to = to or Output()
    predictor = Predictor(checkpoint, device)
    spec = predictor.spec
    layouts = [find_layout(folder) for folder in inputs]
    if layouts[0] and len(inputs) == 1:
        cases = [Case(case.name, case.images) for case in layouts[0].tested(inputs[0])]
    else:
        cases = input_cases(inputs, spec.files_per_case, spec.suffix)
    targets = [output / f"{case.name}{_ending(case)}" for case in cases]
    for case, target in zip(cases, targets, strict=True):
        if any(target.resolve() == image.resolve() for image in case.images):
            raise UserError(f"{target}: would replace the input image; give another output folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; expected a folder for the masks")
    with only_writer(output):
        kept = {t for t in targets if not to.overwrite and complete(t, to.probabilities)}
        todo = [(c, t) for c, t in zip(cases, targets, strict=True) if t not in kept]
        weights = checkpoint / "best.ckpt" if checkpoint.is_dir() else checkpoint
        say_kept(output, kept, len(targets), [weights])
        for case, target in tqdm(todo, desc="predict", unit="case", disable=not to.progress):
            _one(predictor, case, target, to)
    return targets


def _one(predictor: Predictor, case: Case, target: Path, to: Output) -> None:
    spec = predictor.spec
    image = read_image(case.images, spec.axis)
    if image.shape[1] != spec.channels:
        raise UserError(
            f"{case.images[0]}: {image.shape[1]} channel(s), but the model was trained with {spec.channels}"
        )
    probabilities = predictor.probabilities(image)
    classes = probabilities.argmax(0)
    name = target.name[: -len(_ending(case))]
    save_probabilities(target, restore(probabilities, case.images[0], spec.axis) if to.probabilities else None)
    if to.overlay:
        overlay = target.parent / "overlays" / f"{name}.png"
        overlay.parent.mkdir(exist_ok=True)
        with replacing(overlay) as partial:
            save_overlay(partial, image, {"prediction": classes}, spec.classes, upright=is_volume(case.images[0]))
    write_mask(target, np.asarray(spec.values)[classes], case.images[0], spec.axis)


def _ending(case: Case) -> str:
    if is_array(case.images[0]):
        return ".nii.gz"
    found = ending(case.images[0]) or ".png"
    return found if is_volume(case.images[0]) or found not in (".jpg", ".jpeg") else ".png"

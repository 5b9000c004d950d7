"""Training of one fold, its validation on whole cases, and nnU-Net's results tree around both."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from vmamba.errors import UserError
from vmamba.medical.callbacks import Bar, Keep, MetricsFile, read_metrics
from vmamba.medical.evaluate import evaluate_pairs
from vmamba.medical.export import decided, file_probabilities, save_case
from vmamba.medical.fold_module import CLIP, FoldModule, FoldSettings
from vmamba.medical.folds import fold_cases
from vmamba.medical.imagenet import load_start
from vmamba.medical.jobs import FINGERPRINT, Job
from vmamba.medical.model_folder import ModelFolder, Trained, load_model, open_model, save_model, write_plain
from vmamba.medical.networks import build, raise_patch
from vmamba.medical.patches import Draws, PatchData, Patches
from vmamba.medical.plots import save_curves
from vmamba.medical.preprocess import check_rules, rules, stored_cases
from vmamba.medical.pretrained import describe
from vmamba.medical.quiet import quiet
from vmamba.medical.raw import read_dataset_json
from vmamba.medical.runs import write_json
from vmamba.medical.train import Hardware, build_trainer, fit
from vmamba.medical.watch import Watch
from vmamba.medical.window import Window, volume_logits
from vmamba.medical.written import drop_masks
from vmamba.safety import only_writer

SHOWN = 10  # steps from one drawing of the bar to the next beside a GPU, which has to wait for it
FILES = ("checkpoint_best.pth", "checkpoint_final.pth", "checkpoint_latest.ckpt", "metrics.csv", "progress.png")


@dataclass
class After:
    """What follows the last epoch."""

    npz: bool = False
    validate_best: bool = False
    validate_only: bool = False
    mirror: bool = True


def train_fold(
    job: Job, fold: str, settings: FoldSettings, hardware: Hardware, *, resume: bool, overwrite: bool, after: After
) -> dict[str, Any]:
    """Trains into RESULTS/TRAINER__PLANS__CONFIG/fold_X and returns the summary of its validation cases."""
    names = [case.name for case in job.dataset.cases()]
    train, val = fold_cases(job.preprocessed / "splits_final.json", names, fold)
    folder = job.folder / f"fold_{fold}"
    final = folder / "checkpoint_final.pth"
    stored_cases(job.stored, [*train, *val])
    check_rules(job.stored, [*train, *val], rules(job.plans, job.configuration))
    if after.validate_only and not final.exists():
        raise UserError(f"{final}: not there; train fold {fold} before --val")
    if folder.exists() and any(folder.glob("checkpoint_*")) and not (resume or overwrite or after.validate_only):
        raise UserError(f"{folder}: holds a training; continue it with --c, or replace it with --overwrite")
    with only_writer(folder), quiet():
        model = _describe(job)
        if not after.validate_only and not (resume and final.exists()):
            _run(job, (train, val), folder, settings, hardware, resume)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return {}
        best = after.validate_best and (folder / "checkpoint_best.pth").exists()
        chosen = folder / ("checkpoint_best.pth" if best else "checkpoint_final.pth")
        return _validate(job, model, val, chosen, hardware, after)


def _describe(job: Job) -> ModelFolder:
    write_plain(job.folder / "plans.json", job.plans)
    write_plain(job.folder / "dataset.json", job.dataset.json)
    found = job.preprocessed / FINGERPRINT
    if found.exists():
        write_plain(job.folder / FINGERPRINT, read_dataset_json(found))
    return open_model(job.folder)


def _run(
    job: Job,
    cases: tuple[Sequence[str], Sequence[str]],
    folder: Path,
    settings: FoldSettings,
    hardware: Hardware,
    resume: bool,
) -> None:
    c, labels = job.configuration, job.dataset.labels
    torch.manual_seed(settings.seed)
    network = build(settings.trainer, c, len(job.dataset.channels), labels.outputs, settings.network)
    latest = folder / "checkpoint_latest.ckpt"
    again = resume and latest.exists()
    if settings.pretrained and not again:
        source = Path(settings.pretrained)
        print(describe(load_start(network, source), source))
    patch = raise_patch(network, tuple(settings.patch or c.patch))
    train, val = _patches(job, cases, patch, settings)
    module = FoldModule(network, labels, settings, c.batch_dice)
    module.captures = hardware.graphs
    if not again:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        drop_masks(folder / "validation")
    state = {
        "trainer_name": settings.trainer,
        "settings": settings.as_dict(),
        "patch": list(patch),
        "init_args": {"configuration": c.name, "fold": folder.name.removeprefix("fold_")},
        "inference_allowed_mirroring_axes": tuple(range(c.axes)),
    }
    size = sum(p.numel() for p in network.parameters()) / 1e6
    print(f"{folder}: {settings.trainer}, {size:.2f} M parameters, {len(cases[0])} + {len(cases[1])} cases")
    steps = f"batch {train.draws.batch}, {settings.epochs} x {settings.iterations} steps"
    print(f"patches of {' x '.join(map(str, patch))}, {steps}")
    watch, rows = Watch(settings.lr, settings.precision), MetricsFile(folder / "metrics.csv")
    callbacks = [watch, rows, Checkpoints(folder, state)]
    bar = [Bar(SHOWN if hardware.on_gpu else 1)] if hardware.progress else []
    trainer = build_trainer(
        hardware,
        [*callbacks, Keep(folder, latest.stem, None), *bar],
        folder,
        max_epochs=settings.epochs,
        precision=settings.precision,
        gradient_clip_val=CLIP,
        benchmark=True,  # patches have one shape
    )
    fit(trainer, module, PatchData(train, val, hardware.loaders), latest if again else None)
    save_curves(folder / "progress.png", read_metrics(folder / "metrics.csv"))
    latest.unlink(missing_ok=True)


def _patches(
    job: Job, cases: tuple[Sequence[str], Sequence[str]], patch: tuple[int, ...], settings: FoldSettings
) -> list[Patches]:
    """Those to train on and those to validate, of the two groups of ``cases``."""
    batch, wanted = settings.batch_size or job.configuration.batch, [v for t in job.dataset.labels.targets for v in t]
    parts = zip(cases, (settings.iterations, settings.val_iterations), (settings.augmentation, "none"), strict=True)
    return [
        Patches(stored_cases(job.stored, names), patch, Draws(batch, count, settings.seed + i), augmentation, wanted)
        for i, (names, count, augmentation) in enumerate(parts)
    ]


class Checkpoints(Callback):
    """checkpoint_best.pth when the moving average of the Dice rises, checkpoint_final.pth at the end."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder, self.state = folder, state

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the best, and the last of all."""
        assert isinstance(pl_module, FoldModule)
        state = {**self.state, "current_epoch": trainer.current_epoch + 1, "_best_ema": pl_module.best}
        if pl_module.average is not None and pl_module.average > pl_module.best:
            pl_module.best = state["_best_ema"] = pl_module.average
            self._save("checkpoint_best.pth", trainer, pl_module, state)
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self._save("checkpoint_final.pth", trainer, pl_module, state)

    def _save(self, name: str, trainer: pl.Trainer, module: FoldModule, state: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            save_model(self.folder / name, module.network, state)


def _validate(
    job: Job, model: ModelFolder, names: Sequence[str], checkpoint: Path, hardware: Hardware, after: After
) -> dict[str, Any]:
    trained = load_model(model, checkpoint)
    device = torch.device("cuda" if hardware.on_gpu else "cpu")
    trained.network.to(device)
    folder = checkpoint.parent / "validation"
    folder.mkdir(exist_ok=True)
    drop_masks(folder, keep=names)
    cases = {case.name: case for case in job.dataset.cases()}
    window, start = Window(mirror=after.mirror, device=device), time.perf_counter()
    pairs = []
    for stored in stored_cases(job.stored, names):
        case, target = cases[stored.name], folder / f"{stored.name}{job.dataset.ending}"
        assert case.label is not None
        predict_stored(model, [trained], stored, window, target, case.images[0], keep=after.npz)
        pairs.append((case.label, target))
    summary = evaluate_pairs(pairs, job.dataset.labels, progress=False)
    write_json(folder / "summary.json", {**summary, "seconds": round(time.perf_counter() - start, 1)})
    return summary


def predict_stored(
    model: ModelFolder, trained: Sequence[Trained], case: Any, window: Window, target: Path, like: Path, *, keep: bool
) -> None:
    """Predicts a preprocessed case into ``target``."""
    out = volume_logits(trained, torch.from_numpy(case.data[:].copy()), window)
    maps = file_probabilities(out, case.crop, model.labels, model.plans, model.configuration)
    save_case(target, *decided(maps, model.labels, keep), like)

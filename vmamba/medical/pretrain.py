"""Pre-training without labels: from settings to a run folder with the encoder's weights in it."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

import vmamba
from vmamba.errors import UserError
from vmamba.heads.mambamim import MambaMIM
from vmamba.medical.callbacks import Bar, Keep, MetricsFile, read_metrics
from vmamba.medical.cases import is_deep
from vmamba.medical.fold_train import SHOWN
from vmamba.medical.jobs import open_job
from vmamba.medical.networks import build, raise_patch
from vmamba.medical.patches import Draws
from vmamba.medical.preprocess import Stored
from vmamba.medical.pretrain_data import ImageData, ImagePatches, dataset_images, folder_files, folder_images
from vmamba.medical.pretrain_module import CLIP, Pretrainer
from vmamba.medical.pretrain_plots import Turn, save_loss, save_rebuilt
from vmamba.medical.pretrain_settings import TOKI, PretrainSettings
from vmamba.medical.quiet import quiet
from vmamba.medical.raw import Places
from vmamba.medical.readers import read_image
from vmamba.medical.runs import check_run, write_json
from vmamba.medical.train import Hardware, build_trainer, fit
from vmamba.medical.watch import Watch
from vmamba.registry import entries
from vmamba.safety import LOCK, only_writer, replacing
from vmamba.segmentor import Segmentor

FORMAT = "vmamba-encoder-1"
FILES = ("config.json", "metrics.csv", "curves.png", "rebuilt.png", "encoder.ckpt", "last.ckpt", "summary.json")
UNTRAINED = {"config.json", "images", LOCK}  # what a run may leave that has not trained yet
SIDES = {2: 224, 3: 96}  # of a patch; 96 is MambaMIM's
BATCH = {2: 32, 3: 4}
PICTURED, CANDIDATES = 3, 12  # slices of the picture, and patches that they are chosen from


@dataclass
class Found:
    """A network to pre-train, its patch and batch, and the images."""

    network: Segmentor
    patch: tuple[int, ...]
    batch: int
    images: list[Stored]
    turn: Turn


def pretrain(
    run: Path,
    settings: PretrainSettings,
    places: Places | None = None,
    *,
    hardware: Hardware | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Pre-trains into the folder ``run`` and returns what its summary.json holds; ``places`` of a planned data set.

    Raises UserError for bad input, :class:`vmamba.medical.train.Interrupted` after Ctrl-C.
    """
    hardware = hardware or Hardware()
    if not resume and (not run.is_dir() or {p.name for p in run.iterdir()} - UNTRAINED):
        check_run(run, overwrite)
    with quiet(), only_writer(run):
        torch.manual_seed(settings.seed)
        found = find(run, settings, places, hardware.progress)
        model = build_model(found, settings)
        module = Pretrainer(model, settings)
        draws = Draws(found.batch, settings.iterations, settings.seed)
        slices = settings.dataset is None and len(found.patch) == 2
        patches = ImagePatches(found.images, found.patch, draws, floor=slices)
        watch, rows = Watch(settings.lr, settings.precision), MetricsFile(run / "metrics.csv", rates)
        callbacks = [watch, rows, Results(run, patches, found.turn), Keep(run, "last", None)]
        bar = [Bar(SHOWN if hardware.on_gpu else 1)] if hardware.progress else []
        trainer = build_trainer(
            hardware,
            [*callbacks, *bar],
            run,
            max_epochs=settings.epochs,
            precision=settings.precision,
            gradient_clip_val=CLIP,
        )
        if trainer.is_global_zero and not resume:
            for name in FILES:
                (run / name).unlink(missing_ok=True)
            write_json(run / "config.json", {"settings": settings.as_dict(), "patch": found.patch})
        if trainer.is_global_zero:
            announce(found, model, settings)
        start = time.perf_counter()
        fit(trainer, module, ImageData(patches, hardware.loaders), run / "last.ckpt" if resume else None)  # pyright: ignore
        return finish(run, trainer, found, start) if trainer.is_global_zero else {}


def find(run: Path, settings: PretrainSettings, places: Places | None, progress: bool) -> Found:
    """Network and images of the settings; UserError if they do not fit each other."""
    if settings.dataset is not None:
        assert places is not None and settings.configuration is not None
        job = open_job(places, settings.dataset, settings.configuration, settings.network, settings.plans)
        c, turned = job.configuration, job.dataset.ending.startswith(".nii")
        network = build(settings.network, c, len(job.dataset.channels), 2, settings.options)
        patch, batch = settings.patch or c.patch, c.batch
        _check_sides(patch, c.axes, c.name)
        images = dataset_images(job, settings, progress=progress)
        turn = np.flipud if turned else np.asarray
    else:
        files = folder_files(Path(str(settings.data)))
        first = next(iter(files.values()))
        channels = read_image(first, settings.axis).shape[1]
        network, patch = create(settings, channels)
        batch = BATCH[network.axes]
        images = folder_images(files, network.axes, channels, settings, run / "images", progress=progress)
        slices = np.rot90 if network.axes == 2 else np.flipud
        turn = slices if is_deep(first[0]) else np.asarray
    return Found(network, raise_patch(network, tuple(patch)), settings.batch_size or batch, images, turn)  # pyright: ignore


def create(settings: PretrainSettings, channels: int) -> tuple[Segmentor, tuple[int, ...]]:
    """A segmentation network by its name in the zoo, and its patch; UserError if there is none of this name."""
    name, asked = settings.network, settings.patch
    known = sorted(key for key, entry in entries().items() if issubclass(entry.cls, Segmentor))
    if name not in known:
        raise UserError(f"--model {name}: no such segmentation network; choose from {', '.join(known)}")
    own = entries()[name].settings.get("patch")
    fitting: dict[str, Any] = {"patch": asked} if asked and own is not None else {}
    try:
        network: Any = vmamba.create_model(name, num_classes=2, in_chans=channels, **fitting | settings.options)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"network {name!r}: {error}") from error
    if asked and len(asked) == 1:
        asked = asked * network.axes
    own = settings.options.get("patch", own)
    default = (own,) * network.axes if isinstance(own, int) else own or (SIDES[network.axes],) * network.axes
    _check_sides(asked or default, network.axes, name)
    return network, tuple(asked or default)


def _check_sides(patch: Any, axes: int, name: str) -> None:
    if len(patch) != axes:
        raise UserError(f"--patch {' '.join(map(str, patch))}: {name} needs {axes} sides")


def build_model(found: Found, settings: PretrainSettings) -> MambaMIM:
    """The objective around a network; UserError if the network or its patch does not suit it."""
    scrambled, name = TOKI[settings.toki], settings.network
    try:
        model = MambaMIM(found.network, width=settings.width, scrambled=scrambled, patch=found.patch)
    except ValueError as error:
        raise UserError(f"network {name!r} cannot be pre-trained like this: {error}") from error
    cells = math.prod(model.cells(found.patch))
    visible = round(cells * (1 - settings.mask_ratio))
    if not 2 <= visible < cells:
        sides, cell = (" x ".join(map(str, n)) for n in (found.patch, model.cell))
        raise UserError(
            f"a patch of {sides} has {cells} cells of {cell}, of which {visible} would be visible; expected at least 2 "
            "and not all: give a larger --patch or another --mask-ratio"
        )
    return model


def announce(found: Found, model: MambaMIM, settings: PretrainSettings) -> None:
    """Says what is going to happen."""
    sizes = [
        sum(p.numel() for p in part if p.requires_grad) / 1e6
        for part in (model.network.parameters(), model.parameters())
    ]
    patch, cell = (" x ".join(map(str, n)) for n in (found.patch, model.cell))
    print(f"{settings.network}: encoder of {sizes[0]:.2f} M parameters, decoder of {sizes[1] - sizes[0]:.2f} M")
    print(f"{len(found.images)} image(s); patches of {patch}, {settings.mask_ratio:.0%} of the cells of {cell} hidden")
    print(f"batch {found.batch}, {settings.epochs} x {settings.iterations} steps")


def finish(run: Path, trainer: pl.Trainer, found: Found, start: float) -> dict[str, Any]:
    """Curves and summary.json."""
    rows = read_metrics(run / "metrics.csv")
    save_loss(run / "curves.png", rows)
    summary = {
        "epochs": len(rows),
        "steps": int(rows[-1]["step"]),
        "seconds": round(time.perf_counter() - start, 1),
        "images": len(found.images),
        "first_loss": float(rows[0]["train_loss"]),
        "last_loss": float(rows[-1]["train_loss"]),
        "loss": "mean squared error over hidden cells, each scaled to mean 0 and variance 1; all zeros give about 1",
        "device": str(trainer.strategy.root_device),
    }
    write_json(run / "summary.json", summary)
    return summary


def rates(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Learning rate and weight decay, which change with the epochs."""
    group = trainer.optimizers[0].param_groups[0]
    return {name: group[name] for name in ("lr", "weight_decay")}


class Results(Callback):
    """After each epoch encoder.ckpt, the weights that segmentation starts from, and rebuilt.png."""

    def __init__(self, run: Path, patches: ImagePatches, turn: Turn) -> None:
        self.run, self.patches, self.turn = run, patches, turn

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes both, whole or not at all."""
        assert isinstance(pl_module, Pretrainer)
        model, s = pl_module.model, pl_module.settings
        state = {
            "format": FORMAT,
            "network": s.network,
            "settings": s.as_dict(),
            "patch": list(self.patches.patch),
            "epoch": trainer.current_epoch + 1,
            "network_weights": model.encoder_state(),
        }
        with replacing(self.run / "encoder.ckpt") as partial:
            torch.save(state, partial)
        self._draw(pl_module)

    def _draw(self, module: Pretrainer) -> None:
        drawn = [self.patches[2**20, i] for i in range(CANDIDATES)]  # an epoch that is never trained
        x = torch.stack(sorted(drawn, key=lambda image: -float(image.std()))[:PICTURED]).to(module.device)
        visible = module.visible_cells(len(x), tuple(x.shape[2:]), (2**20,))
        training = module.training
        module.eval()
        with torch.no_grad():
            rebuilt = module.model.picture(x, visible).float()
        module.train(training)
        cells = visible.view(len(x), *module.model.cells(x.shape[2:]))
        mask = torch.nn.functional.interpolate(cells[:, None].float(), size=x.shape[2:])[:, 0].bool()
        image, rebuilt = x.cpu().float(), rebuilt.cpu()
        if x.ndim == 5:  # the slices in the middle
            middle = x.shape[2] // 2
            image, mask, rebuilt = image[:, :, middle], mask[:, middle], rebuilt[:, :, middle]
        with replacing(self.run / "rebuilt.png") as partial:
            save_rebuilt(partial, image.numpy(), mask.numpy(), rebuilt.numpy(), self.turn)

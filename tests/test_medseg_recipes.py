"""The recipes of the 2D papers: values, schedule, augmentation, frozen encoder, and the table in the documentation."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.medseg_data import TINY

pytest.importorskip("monai")
pytest.importorskip("lightning")
from vmamba.medical.layouts import LAYOUTS
from vmamba.medical.module import Segmenter
from vmamba.medical.recipes import RECIPES, settings_for
from vmamba.medical.spec import Spec
from vmamba.medical.transforms import AUGMENTATIONS, Augment

PUBLISHED = {  # loss, lr, last lr, weight decay, side, normalisation, augmentation, best by
    "vmunet-isic": ("BCE + Dice", 1e-3, 1e-5, 1e-2, 256, "range255", "vmunet-isic", "val_loss"),
    "mhs-isic": ("BCE + Dice", 1e-3, 1e-5, 1e-2, 256, "range255", "vmunet-isic", "val_loss"),
    "vmunet-synapse": ("CE + Dice", 1e-3, 1e-5, 1e-2, 224, "none", "transunet", "train_loss"),
    "msvm-synapse": ("0.4 CE + 0.6 Dice", 5e-4, 1e-6, 1e-3, 224, "centred", "msvm", "train_loss"),
    "msvm-acdc": ("0.4 CE + 0.6 Dice", 5e-4, 1e-6, 1e-4, 224, "centred", "msvm", "val_dice"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes(name):
    chosen, s = RECIPES[name], settings_for({"recipe": name})
    rest = (s.lr, s.min_lr, s.weight_decay, s.size[0], s.normalisation, s.augmentation, chosen.best)
    assert (chosen.loss, *rest) == PUBLISHED[name] and (s.epochs, s.batch_size, s.seed) == (300, 32, 42)
    other = settings_for({"recipe": name, "lr": 0.5, "network": {"drop_path_rate": 0.0}})
    assert other.lr == 0.5 and other.network == {**chosen.network, "drop_path_rate": 0.0}
    assert settings_for({"recipe": name, "model": "lightm_unet_2d"}).network == {}


def test_the_documentation_has_the_recipes():
    text = (Path(__file__).parent.parent / "docs/medseg.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert rows.keys() == RECIPES.keys() and all(f"| {name} " in text for name in LAYOUTS)
    for name, chosen in RECIPES.items():
        s = settings_for({"recipe": name})
        cosine = f"{chosen.half_period} epochs down, {chosen.half_period} up" if chosen.half_period else "once down"
        size = s.size[0] if s.size else "as it is"
        parts = [f"{s.model}, one output" if chosen.sigmoid else s.model, chosen.loss]
        parts += [f"{s.lr:g}, {s.weight_decay:g}", f"{cosine}, to {s.min_lr:g}", f"{size}, {s.normalisation}"]
        assert rows[name] == f"| `{name}` | {' | '.join([*parts, s.augmentation, chosen.best])} |"


def module_of(recipe, **more):
    spec = prepare_spec(recipe)
    return Segmenter(spec, settings_for({"recipe": recipe, "network": TINY, **more}))


def prepare_spec(recipe):
    chosen = RECIPES[recipe]
    values = [0, 255] if chosen.sigmoid else [0, 1, 2]
    names = ["background", "a", "b"][: len(values)]
    return Spec("vmunet", TINY, 3, values, names, [32, 32], 2, "none", sigmoid=chosen.sigmoid)


def test_the_cosine_goes_up_again():
    module = module_of("vmunet-isic")
    step = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(module.parameters(), 1e-3), 50, 1e-5)
    for epoch in range(0, 120):
        assert 1e-3 * module.rate(epoch) == pytest.approx(step.get_last_lr()[0], rel=1e-6)
        step.optimizer.step()
        step.step()
    module = module_of("plain")
    module.total_steps = 10
    assert module.rate(10) == module.rate(20) == pytest.approx(1e-2)


@pytest.mark.parametrize("name", ["vmunet-isic", "transunet", "msvm"])
def test_augmentation_keeps_image_and_label_together(name):
    label = torch.zeros(64, 64, dtype=torch.long)
    label[22:34, 26:44] = 1
    augment, seen = Augment((64, 64), name), set()
    for seed in range(25):
        image, moved = augment(label[None].float(), label, seed)
        again = augment(label[None].float(), label, seed)
        assert torch.equal(image, again[0]) and torch.equal(moved, again[1])
        assert image.shape == (1, 64, 64) and moved.dtype == torch.long and set(moved.unique().tolist()) <= {0, 1}
        if moved.any():
            assert image[0][moved == 1].median() > image[0][moved == 0].median() + 0.3, seed
        seen.add(moved.numpy().tobytes())
    assert len(seen) > 6 and name in AUGMENTATIONS


def test_the_encoder_waits():
    module = module_of("msvm-acdc", model="vmunet")
    module.trainer = trainer = cast(Any, SimpleNamespace(global_step=0))
    network = cast(Any, module.network)
    for epoch, none in ((9, True), (10, False)):
        trainer.current_epoch = epoch
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters(), 1.0))
        assert all((p.grad is None) is none for p in network.encoder.parameters())
        assert all(p.grad is not None for p in network.decoder.parameters())

"""Pre-training by MambaMIM: hidden cells stay hidden in every network, and the encoder arrives in the segmentation."""

import csv
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vmamba
from tests.medseg_data import TINY, pictures
from tests.medseg_nnunet import DEEP, SHORT, ball, dataset, save

pytest.importorskip("monai")
pytest.importorskip("lightning")
from vmamba.errors import UserError
from vmamba.heads.mambamim import MambaMIM, encoder_maps, random_cells
from vmamba.medical.patches import Draws
from vmamba.medical.preprocess import Stored
from vmamba.medical.pretrain_data import ImagePatches
from vmamba.medical.pretrain_module import Pretrainer, decay, rate
from vmamba.medical.pretrain_settings import PretrainSettings
from vmamba.medical.pretrained import load_pretrained
from vmamba.tools.cli import main, parser
from vmamba.tools.medseg_pretrain import BOTH, DATASET, FOLDER
from vmamba.visible import visible_routes

FLAT = dict(features=(4, 8, 8), strides=((1, 1), (2, 2), (2, 2)))
VOLUME = dict(features=(4, 8, 8), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), 3, 3))
ONES = dict(depths=(1, 1, 1, 1))
NETWORKS = {  # name: settings that make it small
    "hymamba": dict(dims=(4, 8, 12), depths=(1, 1), ratios=(2, 2), depth=2, patch=8),
    "lightm_unet_2d": dict(dim=8, depths=(1, 1, 1)) | dict(depths_decoder=(1, 1)),
    "lightm_unet_3d": dict(dim=8, depths=(1, 1, 1)) | dict(depths_decoder=(1, 1)),
    "msvm_unet_tiny": dict(dim=8, **ONES),
    "swin_umamba": dict(dim=8, **ONES),
    "swin_umamba_d": dict(dim=8, **ONES),
    "umamba_bot_2d": FLAT,
    "umamba_v1_enc_2d": FLAT,
    "umamba_bot_3d": VOLUME,
    "umamba_v1_enc_3d": VOLUME,
    "vmunet": TINY,
}
OTHERS = {  # whose scans read half a map in another order than a map of half the size
    "mhs_unet_3h": TINY,
    "umamba_enc_2d": FLAT | dict(patch=(16, 16)),
    "umamba_enc_3d": VOLUME | dict(patch=(4, 16, 16)),
}
HIDE = ["--width", 8, "--epochs", 2, "--iterations", 3, "--batch-size", 2, "--lr", "1e-3", "-device", "cpu"]
QUIET = "--no-progress"


pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words):
    return main(["medseg", *map(str, words)])


def model_of(name):
    torch.manual_seed(0)
    settings = {**NETWORKS, **OTHERS}[name]
    network = vmamba.create_model(name, in_chans=1, num_classes=2, **settings)
    model = MambaMIM(network, width=32, patch=settings.get("patch"))
    fixed = name in OTHERS and "patch" in settings
    return model.double().eval(), list(settings["patch"]) if fixed else [4 * side for side in model.cell]


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_half_an_image_is_seen_as_an_image_of_half_the_size(name):
    model, grid = model_of(name)
    x, half = torch.randn(1, 1, *grid, dtype=torch.float64), grid[-1] // 2
    cells = torch.zeros(model.cells(grid), dtype=torch.bool)
    cells[..., :2] = True
    cut = encoder_maps(model.network, x[..., :half])
    for y, wanted in zip(model.encode(x, cells.view(1, -1)), cut, strict=True):
        seen, hidden = y.chunk(2, -1)
        assert (seen - wanted).abs().max() < 1e-9 * wanted.std()
        assert hidden.std((0, *range(2, hidden.ndim))).max() < 1e-6  # zeros, or the token for a hidden cell


@pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])
def test_hidden_pixels_do_not_matter_and_samples_do_not_meet(name):
    model, grid = model_of(name)
    x = torch.randn(3, 1, *grid, dtype=torch.float64)
    visible = random_cells(3, math.prod(model.cells(grid)), 0.5)
    visible[2] = visible[0]
    here = nn.functional.interpolate(visible.view(3, 1, *model.cells(grid)).float(), size=grid).bool()
    other = torch.where(here, x, torch.randn_like(x))
    with torch.no_grad():
        maps = model.encode(x, visible)
        assert all(torch.equal(a, b) for a, b in zip(maps, model.encode(other, visible), strict=True))
        for i in range(3):
            alone = model.encode(x[i : i + 1], visible[i : i + 1])
            assert all((a[i] - b[0]).abs().max() < 1e-9 * b.std() for a, b in zip(maps, alone, strict=True))
        rebuilt = model.picture(x, visible)
    assert torch.equal(rebuilt[here], x[here]) and not torch.allclose(rebuilt[~here], x[~here])
    model.train().loss(x, visible).backward()
    wanted = {n for n, p in model.network.named_parameters() if p.grad is not None}
    assert wanted == model.trained == {n for n, p in model.network.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_networks_that_cannot_leave_cells_out_are_refused():
    class Everywhere(nn.Module):
        def forward(self, x):
            return x + x.mean((1, 2), keepdim=True)

    network = vmamba.create_model("swin_umamba_d", in_chans=1, **NETWORKS["swin_umamba_d"])
    network.encoder.body.stages[1].blocks[0].mixer = Everywhere()
    with pytest.raises(ValueError, match="mixes hidden with visible pixels"):
        MambaMIM(network, width=32)
    with pytest.raises(ValueError, match=r"no encoder that could be pre-trained; these have: HyMamba, LightMUNet"):
        encoder_maps(nn.Linear(1, 1), torch.zeros(1))
    with pytest.raises(ValueError, match="width must be a multiple of 4 for 2 maps, got 6"):
        MambaMIM(vmamba.create_model("umamba_bot_2d", **FLAT), width=6)


def test_routes_without_hidden_pixels():
    order = torch.tensor([[0, 1, 2, 3], [3, 4, 1, 4]])  # of four pixels; 4 is a zero
    visible = torch.tensor([True, False, True, True])
    assert visible_routes(order, visible).tolist() == [[0, 2, 3], [3, 4, 4]]


def test_masks_rates_and_decay_are_the_published_ones():
    model, _ = model_of("umamba_bot_2d")
    module = Pretrainer(model, PretrainSettings())
    cells = module.visible_cells(5, (40, 20), (1, 0))
    assert cells.shape == (5, 50) and set(cells.sum(1).tolist()) == {12}  # round(50 (1 - 0.75)), half to even
    assert len({tuple(row) for row in cells.tolist()}) == 5
    assert torch.equal(cells, module.visible_cells(5, (40, 20), (1, 0)))
    assert not torch.equal(cells, module.visible_cells(5, (40, 20), (2, 0)))
    module.settings.masks = "batch"
    shared = module.visible_cells(5, (40, 20), (1, 0))
    assert (shared == shared[0]).all() and shared[0].sum() == 12
    assert [rate(d, 0.4) for d in (0, 0.4, 1)] == pytest.approx([0.005, 1, 0.001])
    assert rate(0.2, 0.4) == pytest.approx(0.5025) and rate(0.7, 0.4) == pytest.approx(0.5005)
    assert [decay(d, module.settings) for d in (0, 0.5, 1)] == pytest.approx([0.04, 0.12, 0.2])


def test_the_objective_falls():
    model, _ = model_of("umamba_bot_2d")
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    image = torch.stack([torch.sin((y + s) / 2) + torch.cos((x - s) / 3) for s in range(4)])[:, None].double()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        visible = random_cells(4, 16, 0.75, generator=torch.Generator().manual_seed(step))
        losses.append(model.loss(image, visible))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """A planned data set and a pre-training on its images and on those of a further folder."""
    root = tmp_path_factory.mktemp("pre ß")
    folder = dataset(root, test=1)
    assert run("plan", "-d", 7, "--root", root, QUIET) == 0
    assert run("preprocess", "-d", 7, "-c", "3d_fullres", "--root", root, QUIET) == 0
    further = ["--images", folder / "imagesTs"]
    assert run("pretrain", 7, "3d_fullres", "-o", root / "run", "--root", root, *DEEP, *further, *HIDE, QUIET) == 0
    return root


def test_run_folder_of_a_planned_data_set(life):
    names = {p.name for p in (life / "run").iterdir()}
    assert names - {".vmamba.lock"} == {
        *("config.json", "curves.png", "encoder.ckpt", "last.ckpt", "metrics.csv", "rebuilt.png", "summary.json")
    }
    stored = torch.load(life / "run/encoder.ckpt", weights_only=True)
    assert (stored["network"], stored["epoch"]) == ("nnUNetTrainerUMambaBot", 2)
    assert {name.split(".")[0] for name in stored["network_weights"]} == {"stem", "stages", "mamba"}
    assert json.loads((life / "run/summary.json").read_text())["images"] == 5 + 1
    rows = list(csv.DictReader((life / "run/metrics.csv").open()))
    assert [row["step"] for row in rows] == ["3", "6"] and float(rows[0]["train_loss"]) > 0


def test_images_without_labels_and_a_fold_without_its_validation_cases(life, capsys):
    out, shape = life / "fold", (20, 18, 12)
    picture = 100 + 100.0 * ball(shape, (10, 9, 6), 5) + np.random.default_rng(0).normal(0, 10, shape)
    unlabelled = life / "nnUNet_raw/Dataset007_Bälle/imagesTr/ohne_0000.nii.gz"
    save(unlabelled, picture)
    words = "pretrain", 7, "3d_fullres", 0, "-o", out, "--root", life, *DEEP, *HIDE, "--epochs", 1, QUIET
    assert run(*words) == 0
    unlabelled.unlink()
    assert json.loads((out / "summary.json").read_text())["images"] == 4 + 1
    assert "5 image(s); patches of" in capsys.readouterr().out
    stored = life / "nnUNet_preprocessed/Dataset007_Bälle/vmamba_nnUNetPlans_3d_fullres_images"
    assert np.load(stored / "ohne.npy").shape == (1, 12, 18, 20)


def test_the_encoder_arrives_in_a_fold(life, capsys):
    again = ["-pretrained_weights", life / "run/encoder.ckpt", "--lr", "1e-30", "--epochs", 1]
    assert run("train", 7, "3d_fullres", 0, "--root", life, *DEEP, *SHORT, *again) == 0
    out = capsys.readouterr().out
    assert "encoder.ckpt: " in out and "tensors loaded: stem (" in out and "first values are kept by up (" in out
    folder = life / "nnUNet_results/Dataset007_Bälle/nnUNetTrainerUMambaBot__nnUNetPlans__3d_fullres/fold_0"
    trained = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    weights = torch.load(life / "run/encoder.ckpt", weights_only=True)["network_weights"]
    assert all(torch.equal(trained["network_weights"][name], tensor) for name, tensor in weights.items())
    assert trained["settings"]["pretrained"] == str(life / "run/encoder.ckpt")


def test_an_interrupted_run_goes_on_to_the_same_bits(life, monkeypatch, capsys):
    out, words = life / "broken", ["--root", life, *DEEP, "--images", life / "nnUNet_raw/Dataset007_Bälle/imagesTs"]
    whole = Pretrainer.training_step

    def stopped(self, batch, index):
        if self.global_step == 4:
            raise KeyboardInterrupt
        return whole(self, batch, index)

    monkeypatch.setattr(Pretrainer, "training_step", stopped)
    assert run("pretrain", 7, "3d_fullres", "-o", out, *words, *HIDE, QUIET) == 130
    assert "continue with --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert run("pretrain", "-o", out, "--resume", "--root", life, "--lr", "0.5", QUIET) == 2
    assert "was started with lr=0.001 (now 0.5)" in capsys.readouterr().err
    assert run("pretrain", "-o", out, "--resume", "--root", life, "-device", "cpu", QUIET) == 0
    a, b = (torch.load(life / name / "encoder.ckpt", weights_only=True) for name in ("run", "broken"))
    assert all(torch.equal(a["network_weights"][name], t) for name, t in b["network_weights"].items())
    a, b = (list(csv.DictReader((life / name / "metrics.csv").open())) for name in ("run", "broken"))
    assert [row["train_loss"] for row in a] == [row["train_loss"] for row in b]


def test_plain_folder_of_pictures(tmp_path, capsys):
    data, out = pictures(tmp_path / "data"), tmp_path / "run"
    tiny = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    half = ["--patch", 64, "--mask-ratio", 0.5, "--toki", "official", "--masks", "batch"]
    words = ["pretrain", "--data", data, "-o", out, "--model", "vmunet", *tiny]
    assert run(*words, *half, *HIDE, "--width", 32, "--epochs", 1, QUIET) == 0
    assert json.loads((out / "config.json").read_text())["settings"]["toki"] == "official"
    assert sorted(p.stem for p in (out / "images").glob("*.npy")) == [f"c{i}" for i in range(5)]
    assert np.load(out / "images/c0.npy").shape == (3, 1, 28, 36)
    patches = ImagePatches([Stored(out / "images", "c0")], (64, 64), Draws(2, 1, 0), floor=True)
    assert patches[0, 0].shape == (3, 64, 64) and torch.equal(patches[0, 1], patches[0, 1])
    assert patches[0, 0].amin((1, 2)).tolist() == np.load(out / "images/c0.npy").min((1, 2, 3)).tolist()
    tuned = ["train", "--data", data, "-o", tmp_path / "tuned", *tiny, "--pretrained", out, "--epochs", 1]
    assert run(*tuned, "--batch-size", 2, "--lr", "1e-30", "--min-lr", 0, "--accelerator", "cpu", QUIET) == 0
    assert "first values are kept by decoder (" in capsys.readouterr().out
    trained = torch.load(tmp_path / "tuned/best.ckpt", weights_only=True)["state_dict"]
    weights = torch.load(out / "encoder.ckpt", weights_only=True)["network_weights"]
    assert all(torch.equal(trained[f"network.{name}"], tensor) for name, tensor in weights.items())
    network = vmamba.create_model("vmunet", **TINY, num_classes=3)
    report = load_pretrained(network, tmp_path / "tuned/best.ckpt")  # a whole network but for its last layer
    assert report.missing == ["outputs.0.weight", "outputs.0.bias"]
    small = PretrainSettings(data=str(data), network="vmunet").as_dict()
    assert small["epochs"] == 100 and small["mask_ratio"] == 0.75 and small["lr"] == 1e-4


def test_weights_that_do_not_fit_are_refused(life):
    file = life / "run/encoder.ckpt"
    same = vmamba.create_model("umamba_bot_3d", features=(4, 8), strides=((1, 1, 1), (2, 2, 2)), kernels=(3, 3))
    assert len(load_pretrained(same, file.parent).loaded) > 10
    wider = vmamba.create_model("umamba_bot_3d", features=(6, 8), strides=((1, 1, 1), (2, 2, 2)), kernels=(3, 3))
    before = wider.stem[0].conv1.weight.clone()
    with pytest.raises(UserError, match=r"made for nnUNetTrainerUMambaBot: .* is 4 .* there and 6 .* here"):
        load_pretrained(wider, file)
    assert torch.equal(wider.stem[0].conv1.weight, before)
    for wrong, words in {
        life / "run/last.ckpt": "0 tensors fit, .* expected encoder.ckpt of vmamba medseg pretrain",
        life / "run/none.ckpt": "no checkpoint at",
        life / "run/metrics.csv": "not a readable checkpoint",
    }.items():
        with pytest.raises(UserError, match=words):
            load_pretrained(same, wrong)


FAULTS = {
    "no images": (["--data", "empty"], "holds no image; expected files ending in"),
    "no folder": (["--data", "nowhere"], "no such folder"),
    "nothing": ([], "expected DATASET CONFIG, or --data DIR"),
    "both": (["7", "2d", "--data", "data"], "--data: only without DATASET"),
    "pictures in 3D": (["--data", "data", "--model", "hymamba"], "a picture; hymamba reads volumes"),
    "a classifier": (["--data", "data", "--model", "vmamba_tiny_s1l8"], "no such segmentation network; choose from"),
    "too few cells": (["--data", "data", "--patch", "32"], "a patch of 32 x 32 has 1 cells of 32 x 32, of which 0"),
    "three sides": (["--data", "data", "--patch", "32", "32", "32"], "--patch 32 32 32: vmunet needs 2 sides"),
    "everything hidden": (["--data", "data", "--mask-ratio", "1"], "--mask-ratio 1.0: expected a share"),
    "another TOKI": (["--data", "data", "--toki", "right"], "unknown; choose from corrected, official"),
    "a window": (["--data", "data", "--window", "3", "1"], "--window 3.0 1.0: expected LOW HIGH"),
    "spacing in 2D": (["--data", "data", "--spacing", "1"], "--spacing: is for networks of 3 dimensions"),
    "nothing to resume": (["--data", "data", "--resume"], "no pre-training to resume"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", 2)
    (tmp_path / "empty").mkdir()
    words, message = FAULTS[fault]
    tiny = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    options = [] if "--model" in words or "7" in words else ["--model", "vmunet", *tiny]
    assert run("pretrain", "-o", "run", "--width", 32, *words, *options, QUIET) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    if "--data" in words and fault != "nothing to resume":  # a corrected command starts where the wrong one was refused
        assert not (tmp_path / "run/last.ckpt").exists()
        good = ["--data", "data", "--model", "vmunet", *tiny, "--mask-ratio", 2]
        assert run("pretrain", "-o", "run", *good, QUIET) == 2 and "--mask-ratio" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(life, capsys):
    before = (life / "run/encoder.ckpt").read_bytes()
    assert run("pretrain", 7, "3d_fullres", "-o", life / "run", "--root", life, *DEEP, *HIDE, QUIET) == 2
    assert "exists and is not empty" in capsys.readouterr().err and (life / "run/encoder.ckpt").read_bytes() == before


def test_documented_commands_parse():
    text = (Path(__file__).parent.parent / "docs/pretraining.md").read_text(encoding="utf-8")
    commands = re.findall(r"^vmamba (.*)$", text, re.MULTILINE)
    assert [parser().parse_args(shlex.split(words)).medseg_command for words in commands] == ["pretrain", "train"] * 2
    documented = set(re.findall(r"`--([a-z-]+)", text))
    known = {flag.removeprefix("--") for table in (BOTH, DATASET, FOLDER) for flag in table}
    assert documented - known <= {"data", "set", "resume", "seed", "pretrained", "images"}

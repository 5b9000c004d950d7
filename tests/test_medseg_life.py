"""The whole life of a data set in nnU-Net's layout: plan, folds, prediction, ensemble, post-processing, evaluation."""

import csv
import json
import shutil
import zipfile

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from tests.medseg_nnunet import DEEP, FLAT, REGIONS, SHORT, dataset
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
pytest.importorskip("lightning")
from vmamba.medical.fold_module import FoldModule
from vmamba.medical.model_folder import load_model, open_model
from vmamba.medical.networks import TRAINERS, build, network_name

QUIET = "--no-progress"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """A root with two configurations planned; 2d trained in two folds, 3d_fullres in one."""
    root = tmp_path_factory.mktemp("life")
    dataset(root)
    assert run("plan", "-d", 7, "--root", root, QUIET) == 0
    assert run("preprocess", "-d", "Dataset007_Bälle", "--root", root, QUIET) == 0
    assert run("train", 7, "2d", 0, 1, "--root", root, "--npz", *FLAT, *SHORT) == 0
    assert run("train", 7, "3d_fullres", 0, "--root", root, *DEEP, *SHORT) == 0
    return root


def model_folder(root, name="nnUNetTrainerVMUNet__nnUNetPlans__2d"):
    return root / "nnUNet_results/Dataset007_Bälle" / name


def test_results_tree(life):
    folder = model_folder(life)
    assert {"plans.json", "dataset.json", "dataset_fingerprint.json", "fold_0", "fold_1"} <= names(folder)
    fold = folder / "fold_0"
    assert names(fold) == {"checkpoint_best.pth", "checkpoint_final.pth", "metrics.csv", "progress.png", "validation"}
    stored = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert stored["trainer_name"] == "nnUNetTrainerVMUNet" and stored["inference_allowed_mirroring_axes"] == (0, 1)
    assert stored["init_args"] == {"configuration": "2d", "fold": "0"} and stored["current_epoch"] == 2
    splits = json.loads((life / "nnUNet_preprocessed/Dataset007_Bälle/splits_final.json").read_text())
    assert {p.removesuffix(".nii.gz") for p in names(fold / "validation") if p.endswith("gz")} == set(splits[0]["val"])
    rows = list(csv.DictReader((fold / "metrics.csv").open()))
    assert len(rows) == 2 and float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    one, two = (float(row["val_dice"]) for row in rows)
    assert float(rows[1]["ema_dice"]) == pytest.approx(0.9 * one + 0.1 * two)


def test_cross_validation_is_scored_together(life):
    folder = model_folder(life) / "crossval_results_folds_0_1"
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2 and set(summary["mean"]) == {"1", "2"}
    each = [
        case["metrics"]["1"]["Dice"]
        for fold in "01"
        for case in json.loads((model_folder(life) / f"fold_{fold}/validation/summary.json").read_text())[
            "metric_per_case"
        ]
    ]
    assert summary["mean"]["1"]["Dice"] == pytest.approx(np.mean(each))
    assert json.loads((folder / "postprocessing.json").read_text())["Dice"]["before"]["1"] == pytest.approx(
        np.mean(each)
    )
    assert (folder / "summary.csv").exists() and len(list(folder.glob("*.npz"))) == 2


def test_predict_ensemble_postprocess_evaluate_plot(life, tmp_path, capsys):
    raw = life / "nnUNet_raw/Dataset007_Bälle"
    common = ["-i", raw / "imagesTs", "-d", 7, "--root", life, "--save_probabilities", "--device", "cpu", QUIET]
    flat, deep, both, final = (tmp_path / name for name in ("flat", "deep", "both", "final"))
    assert run("predict", "-o", flat, "-c", "2d", *FLAT[:2], "-f", 0, 1, "--overlay", *common) == 0
    assert run("predict", "-o", deep, "-m", model_folder(life, "nnUNetTrainerUMambaBot__nnUNetPlans__3d_fullres"),
               *(w for w in common if w not in ("-d", 7)), "--disable_tta") == 0  # fmt: skip
    for name in ("fäll_5", "fäll_6"):
        mask, image = nibabel.load(flat / f"{name}.nii.gz"), nibabel.load(raw / f"imagesTs/{name}_0000.nii.gz")
        assert mask.shape == image.shape and np.array_equal(mask.affine, image.affine)
        maps = np.load(flat / f"{name}.npz")["probabilities"]
        assert maps.shape == (3, *image.shape) and np.allclose(maps.sum(0), 1, atol=1e-5)
        assert np.array_equal(maps.argmax(0), np.asanyarray(mask.dataobj))
    assert len(list((flat / "overlays").glob("*.png"))) == 2

    assert run("ensemble", "-i", flat, deep, "-o", both, "--save_npz", QUIET) == 0
    mean = (np.load(flat / "fäll_5.npz")["probabilities"] + np.load(deep / "fäll_5.npz")["probabilities"]) / 2
    assert np.allclose(np.load(both / "fäll_5.npz")["probabilities"], mean, atol=1e-6)
    assert np.array_equal(np.asanyarray(nibabel.load(both / "fäll_5.nii.gz").dataobj), mean.argmax(0))

    rule = tmp_path / "rule.json"
    rule.write_text('{"steps": [[1, 2]]}')
    assert run("postprocess", "-i", both, "-o", final, "-pp", rule, QUIET) == 0
    assert (
        run("evaluate", raw / "labelsTs", final, "-djfile", raw / "dataset.json", "-o", final / "summary.json", QUIET)
        == 0
    )
    summary = json.loads((final / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2 and summary["foreground_mean"]["n_ref"] > 100
    assert run("postprocess", "-i", both, "-o", tmp_path / "chosen", "-ref", raw / "labelsTs", QUIET) == 0
    words = ["-i", raw / "imagesTs", "-p", final, flat, "-r", raw / "labelsTs", "-djfile", raw / "dataset.json"]
    assert run("plot", *words, "-o", tmp_path / "pictures", "--limit", 1) == 0
    assert Image.open(tmp_path / "pictures/fäll_5.png").size[0] > 800
    assert "1 picture(s)" in capsys.readouterr().out


def test_mirroring_and_parts(life, tmp_path):
    raw = life / "nnUNet_raw/Dataset007_Bälle"
    words = [
        "predict",
        "-i",
        raw / "imagesTs",
        "-m",
        model_folder(life),
        "--device",
        "cpu",
        QUIET,
        "--save_probabilities",
    ]
    assert run(*words, "-o", tmp_path / "whole", "-f", 0) == 0
    for part in (0, 1):
        assert run(*words, "-o", tmp_path / "parts", "-f", 0, "-num_parts", 2, "-part_id", part) == 0
    assert run(*words, "-o", tmp_path / "plain", "-f", 0, "--disable_tta") == 0
    whole, parts, plain = (np.load(tmp_path / f / "fäll_6.npz")["probabilities"] for f in ("whole", "parts", "plain"))
    assert np.array_equal(whole, parts) and not np.allclose(whole, plain, atol=1e-4)
    rejected(lambda: run(*words, "-o", tmp_path / "p", "-num_parts", 2, "-part_id", 2), "-part_id 2")
    rejected(lambda: run(*words, "-o", tmp_path / "p", "-step_size", 0), "-step_size 0")
    rejected(lambda: run(*words, "-o", tmp_path / "p", "-f", 3), "fold_3", "0, 1")


def test_validation_again_and_best(life, tmp_path):
    root = shutil.copytree(life, tmp_path / "root")
    fold = model_folder(root) / "fold_0"
    before = (fold / "checkpoint_final.pth").read_bytes()
    shutil.rmtree(fold / "validation")
    assert run("train", 7, "2d", 0, "--root", root, "--val", "--val_best", *FLAT, *SHORT) == 0
    assert (fold / "validation/summary.json").exists() and (fold / "checkpoint_final.pth").read_bytes() == before
    again = ["train", 7, "2d", 0, "--root", root, *FLAT, *SHORT]
    rejected(lambda: run(*again), fold, "--c", "--overwrite")
    rejected(lambda: run("train", 7, "2d", 2, "--root", root, "--val", *FLAT, *SHORT), "fold_2", "before --val")
    assert run(*again, "--c") == 0 and (fold / "checkpoint_final.pth").read_bytes() == before


def test_an_interrupted_fold_goes_on_to_the_same_weights(life, tmp_path, monkeypatch):
    root = shutil.copytree(life, tmp_path / "root")
    fold = model_folder(root) / "fold_0"
    whole = torch.load(fold / "checkpoint_final.pth", weights_only=True)["network_weights"]
    shutil.rmtree(fold)
    step = FoldModule.training_step

    def stops(self, batch, index):
        if self.current_epoch == 1 and index == 1:
            raise KeyboardInterrupt
        return step(self, batch, index)

    words = ["train", 7, "2d", 0, "--root", root, *FLAT, *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(FoldModule, "training_step", stops)
        assert run(*words) == 130
    assert (fold / "checkpoint_latest.ckpt").exists() and not (fold / "checkpoint_final.pth").exists()
    assert run(*words, "--c") == 0
    again = torch.load(fold / "checkpoint_final.pth", weights_only=True)["network_weights"]
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    assert not (fold / "checkpoint_latest.ckpt").exists()


def test_regions_ignored_labels_two_channels(tmp_path):
    folder = dataset(tmp_path, labels=REGIONS, channels=2, test=1)
    common = ["--root", tmp_path, QUIET]
    assert run("plan", "-d", 7, *common) == 0 and run("preprocess", "-d", 7, "-c", "3d_fullres", *common) == 0
    assert run("train", 7, "3d_fullres", "all", "--root", tmp_path, *DEEP, *SHORT, "--iterations", 20) == 0
    name = model_folder(tmp_path, "nnUNetTrainerUMambaBot__nnUNetPlans__3d_fullres")
    words = ["predict", "-i", folder / "imagesTs", "-o", tmp_path / "out", "-m", name, "--save_probabilities"]
    assert run(*words, "--device", "cpu", QUIET) == 0
    maps = np.load(tmp_path / "out/fäll_5.npz")["probabilities"]
    mask = np.asanyarray(nibabel.load(tmp_path / "out/fäll_5.nii.gz").dataobj)
    assert len(maps) == 2 and np.array_equal(mask, np.where(maps[1] > 0.5, 2, maps[0] > 0.5))
    target = tmp_path / "out/summary.json"
    assert run("evaluate", folder / "labelsTs", tmp_path / "out", "-djfile", folder / "dataset.json", "-o", target) == 0
    beside = tmp_path / "beside.json"  # by the dataset.json that predict left there
    assert run("evaluate", folder / "labelsTs", tmp_path / "out", "-o", beside) == 0
    assert json.loads(beside.read_text())["foreground_mean"] == json.loads(target.read_text())["foreground_mean"]
    metrics = json.loads(target.read_text())["metric_per_case"][0]["metrics"]
    truth = np.asanyarray(nibabel.load(folder / "labelsTs/fäll_5.nii.gz").dataobj)
    assert set(metrics) == {"(1, 2)", "2"} and metrics["(1, 2)"]["n_ref"] == ((truth > 0) & (truth < 3)).sum()
    assert sum(metrics["2"][k] for k in ("TP", "FP", "FN", "TN")) == (truth != 3).sum()


def test_pictures(tmp_path):
    folder = dataset(tmp_path, ending=".png", test=1)
    common = ["--root", tmp_path, QUIET]
    assert run("plan", "-d", 7, *common) == 0 and run("preprocess", "-d", 7, *common) == 0
    plans = json.loads((tmp_path / "nnUNet_preprocessed/Dataset007_Bälle/nnUNetPlans.json").read_text())
    assert list(plans["configurations"]) == ["2d"] and plans["transpose_forward"] == [0, 1, 2]
    assert run("train", 7, "2d", "0", "--root", tmp_path, *FLAT, *SHORT) == 0
    words = ["predict", "-i", folder / "imagesTs", "-o", tmp_path / "out", "-m", model_folder(tmp_path)]
    assert run(*words, "--device", "cpu", QUIET) == 0
    mask = np.asarray(Image.open(tmp_path / "out/fäll_5.png"))
    assert mask.shape == np.asarray(Image.open(folder / "imagesTs/fäll_5_0000.png")).shape and mask.max() <= 2


def written_by_numpy_1(path):
    """The file with numpy's numbers under the name that their module had before NumPy 2."""
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data.replace(b"numpy._core.", b"numpy.core.") if name.endswith(".pkl") else data)


def test_foreign_checkpoints(life, tmp_path):
    """nnU-Net's own files hold numpy's numbers, which load; other objects load only by --trust."""
    folder = shutil.copytree(model_folder(life), tmp_path / "nnUNetTrainerVMUNet__nnUNetPlans__2d")
    path = folder / "fold_0/checkpoint_final.pth"
    stored = torch.load(path, weights_only=True)
    stored["_best_ema"], stored["logging"] = np.float64(0.5), {"mean_fg_dice": [np.float32(0.1)]}
    torch.save(stored, path)
    model = open_model(folder)
    assert load_model(model, path).mirrored == (0, 1)
    written_by_numpy_1(path)
    assert load_model(model, path).mirrored == (0, 1)
    torch.save({**stored, "other": Image.Image}, path)
    rejected(lambda: load_model(model, path), path, "--trust")
    assert load_model(model, path, trust=True).patch == load_model(model, folder / "fold_1/checkpoint_final.pth").patch
    stored["network_weights"].popitem()
    torch.save(stored, path)
    rejected(lambda: load_model(model, path), path, "do not fit")
    path.write_bytes(b"nothing")
    rejected(lambda: load_model(model, path), path, "checkpoint")


def test_trainers_name_networks():
    assert network_name("nnUNetTrainerUMambaBot", 3) == "umamba_bot_3d" and network_name("vmunet", 2) == "vmunet"
    rejected(lambda: network_name("nnUNetTrainerUMambaBott", 3), "nnUNetTrainerUMambaBott", "nnUNetTrainerUMambaBot")
    for name in TRAINERS:
        assert network_name(name, 2)


def names(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_the_first_generation_of_a_trainer(life, tmp_path):
    """U-Mamba's trainers kept their names when their networks changed: the weights say which it is."""
    name = "nnUNetTrainerUMambaBot__nnUNetPlans__3d_fullres"
    folder = tmp_path / name
    (folder / "fold_0").mkdir(parents=True)
    for file in ("plans.json", "dataset.json"):
        shutil.copy(model_folder(life, name) / file, folder)
    plans = json.loads((folder / "plans.json").read_text())
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    for key, value in {
        "features_per_stage": [4, 8],
        "strides": [[1] * 3, [2] * 3],
        "kernel_sizes": [[3] * 3] * 2,
    }.items():
        arguments[key] = value
    (folder / "plans.json").write_text(json.dumps(plans))
    model = open_model(folder)
    for trainer in ("umamba_bot", "umamba_v1_bot"):
        network = build(trainer, model.configuration, 1, 3, {})
        state = {"trainer_name": "nnUNetTrainerUMambaBot", "network_weights": network.state_dict()}
        torch.save(state, folder / "fold_0/checkpoint_final.pth")
        trained = load_model(model, folder / "fold_0/checkpoint_final.pth")
        assert trained.network.state_dict().keys() == network.state_dict().keys() and trained.mirrored == ()
        assert trained.patch == model.configuration.patch

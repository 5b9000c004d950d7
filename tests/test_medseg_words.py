"""What nnU-Net's users type: its words for our options, and plans for voxels of a wished size."""

import json
import shlex

import numpy as np
import pytest
import torch

from tests.medseg_nnunet import SHORT, dataset
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
from vmamba.medical import window as windows
from vmamba.medical.evaluate import evaluate
from vmamba.medical.model_folder import Trained
from vmamba.medical.window import Window, volume_logits
from vmamba.tools.cli import main, parser

QUIET = "--no-progress"
NAME = "Dataset007_Bälle"
PREDICT = "predict -i images -o out -d 7"
WORDS = [  # nnU-Net's and ours
    ("plan -d 7 -npfp 2 --no_pbar --clean", "plan -d 7 -npfp 2 --no-progress --clean"),
    ("plan -d 7 -overwrite_plans_name fine", "plan -d 7 -p fine"),
    ("preprocess -d 7 -plans_name fine -c 2d -np 4 --no_pbar", "preprocess -d 7 -p fine -c 2d -np 4 --no-progress"),
    ("train 7 2d 0 -num_gpus 2 -device cuda", "train 7 2d 0 --devices 2 --accelerator cuda"),
    (f"{PREDICT} --disable_progress_bar", f"{PREDICT} --no-progress"),
]


@pytest.mark.parametrize(("theirs", "ours"), WORDS, ids=[theirs.split()[0] for theirs, _ in WORDS])
def test_words_mean_the_same(theirs, ours):
    found, expected = (vars(parser().parse_args(["medseg", *shlex.split(text)])) for text in (theirs, ours))
    assert found == {**expected, "run": found["run"]}


def test_devices_reach_lightning(tmp_path):
    dataset(tmp_path, test=0)
    place = ["--root", tmp_path, QUIET]
    assert run("plan", "-d", 7, *place) == 0 and run("preprocess", "-d", 7, "-c", "2d", *place) == 0
    rejected(lambda: run("train", 7, "2d", 0, "-num_gpus", 0, "--root", tmp_path, *SHORT), "--devices 0")


def test_sums_in_main_memory_from_the_start(monkeypatch):
    seen, expected = [], volume_logits([one()], image(), Window())
    monkeypatch.setattr(windows, "_cover", lambda *args: seen.append(args[-2:]) or image()[None])
    gpu = torch.device("cuda")
    for host in (False, True):
        volume_logits([one()], image(), Window(device=gpu, precision="32-true", batch=3, host=host))
    assert seen == [(3, gpu), (3, torch.device("cpu"))]
    monkeypatch.undo()
    assert torch.equal(volume_logits([one()], image(), Window(host=True)), expected)


def test_predict_passes_it_on(tmp_path, monkeypatch):
    from vmamba.medical import fold_predict, model_folder

    seen = []
    monkeypatch.setattr(model_folder, "open_model", lambda folder: type("Model", (), {"folder": folder}))
    monkeypatch.setattr(fold_predict, "load_folds", lambda *args: [])
    monkeypatch.setattr(fold_predict, "predict_folder", lambda *args: seen.append(args[-2]) or [])
    (tmp_path / "plans.json").touch()
    words = ["predict", "-i", tmp_path, "-o", tmp_path / "out", "-m", tmp_path, "-device", "cpu"]
    assert run(*words) == 0 and run(*words, "--not_on_device") == 0
    assert [window.host for window in seen] == [False, True]


def one():
    torch.manual_seed(0)
    return Trained(torch.nn.Conv3d(1, 2, 1).eval(), (4, 4, 4), (0,))


def image():
    return torch.arange(5 * 6 * 7.0).reshape(1, 5, 6, 7)


def planned(root, name="nnUNetPlans"):
    return json.loads((root / f"nnUNet_preprocessed/{NAME}/{name}.json").read_text())


def test_plans_for_a_wished_spacing(tmp_path, capsys):
    """3d_fullres has it with the coarsest axis first, 2d the other two; cases are resampled to it."""
    dataset(tmp_path, test=0, cases=3, shape=(40, 36, 24))
    place = ["-d", 7, "--root", tmp_path, QUIET]
    assert run("plan", *place) == 0
    usual = planned(tmp_path)
    asked = ["-overwrite_target_spacing", 1.5, 3, 2.0]
    path = tmp_path / f"nnUNet_preprocessed/{NAME}/nnUNetPlans.json"
    rejected(lambda: run("plan", *place, *asked), path, "exists", "-p", "--overwrite")
    assert planned(tmp_path) == usual
    capsys.readouterr()
    assert run("plan", *place, *asked, "-p", "wished", "--dry-run") == 0
    assert "voxels of 3 x 1.5 x 2 mm" in capsys.readouterr().out and not path.with_name("wished.json").exists()
    assert run("plan", *place, *asked, "-overwrite_plans_name", "wished") == 0
    wished = planned(tmp_path, "wished")
    assert wished["transpose_forward"] == [1, 0, 2] and wished["transpose_backward"] == [1, 0, 2]
    full, flat = (wished["configurations"][key] for key in ("3d_fullres", "2d"))
    assert full["spacing"] == [3, 1.5, 2] and flat["spacing"] == [1.5, 2]
    assert flat["data_identifier"] == "wished_2d" and planned(tmp_path) == usual
    assert full["median_image_size_in_voxels"] == [12, 32, 20]  # of 37, 24 and 41 voxels of 1, 2 and 1 mm
    assert run("preprocess", *place, "-p", "wished", "-c", "3d_fullres") == 0
    cases = [np.load(p) for p in (path.parent / "vmamba_wished_3d_fullres").glob("*.npy") if "_seg" not in p.name]
    assert len(cases) == 3 and np.median([case.shape[1:] for case in cases], 0).tolist() == [12, 32, 20]


def test_the_rules_spacing_wished_for_changes_nothing(tmp_path):
    dataset(tmp_path, test=0, cases=2)
    place = ["-d", 7, "--root", tmp_path, QUIET]
    assert run("plan", *place) == 0
    usual = planned(tmp_path)
    back = [usual["configurations"]["3d_fullres"]["spacing"][i] for i in usual["transpose_backward"]]
    assert run("plan", *place, "--overwrite", "-overwrite_target_spacing", *back) == 0
    assert planned(tmp_path) == usual


WRONG = {
    "two": ([1, 2], "expected three numbers above 0"),
    "four": ([1, 2, 3, 4], "expected three numbers above 0"),
    "zero": ([1, 0, 3], "-overwrite_target_spacing 1 0 3"),
    "below": ([1, 1, -3], "-overwrite_target_spacing 1 1 -3"),
    "nan": (["nan", 1, 1], "-overwrite_target_spacing nan 1 1"),
    "endless": ([1, "inf", 1], "-overwrite_target_spacing 1 inf 1"),
    "too coarse": ([1, 500, 1], "mm along y"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_spacings_that_cannot_be(tmp_path, kind):
    dataset(tmp_path, test=0, cases=1)
    spacing, told = WRONG[kind]
    words = ["plan", "-d", 7, "--root", tmp_path, QUIET, "-overwrite_target_spacing", *spacing]
    rejected(lambda: run(*words), "-overwrite_target_spacing", told)
    rejected(lambda: run(*words, "--dry-run"), told)
    assert not list(tmp_path.glob("nnUNet_preprocessed/*/*.json"))


def test_pictures_have_a_spacing_in_their_plane(tmp_path):
    dataset(tmp_path, test=0, cases=3, ending=".png")
    words = ["plan", "-d", 7, "--root", tmp_path, QUIET, "-overwrite_target_spacing"]
    rejected(lambda: run(*words, 1, 2, 2), "flat", "expected -overwrite_target_spacing 999 2 2")
    assert run(*words, 999, 2, 2) == 0
    (flat,) = planned(tmp_path)["configurations"].values()
    assert flat["spacing"] == [2, 2] and flat["median_image_size_in_voxels"] == [18, 20]


def test_chill(tmp_path, capsys):
    folder = dataset(tmp_path, test=3) / "labelsTs"
    some = tmp_path / "some"
    some.mkdir()
    words = ["medseg", "evaluate", str(folder), str(some), QUIET, "--chill"]
    assert main(words) == 2 and "has no prediction" in capsys.readouterr().err
    (some / "fäll_6.nii.gz").write_bytes((folder / "fäll_6.nii.gz").read_bytes())
    assert main(words[:-1]) == 2 and "has no prediction" in capsys.readouterr().err
    assert main(words) == 0 and f"{folder}: 2 of 3 masks have no prediction" in capsys.readouterr().out
    assert len(evaluate(folder, some, progress=False, chill=True)["metric_per_case"]) == 1
    assert main([*words, "--convention", "synapse", "-pfile", "plans.json"]) == 0


def test_postprocessing_by_a_description(tmp_path):
    folder = dataset(tmp_path, test=2)
    words = ["postprocess", "-i", folder / "labelsTs", "-ref", folder / "labelsTs", QUIET, "-plans_json", "none.json"]
    assert run(*words, "-o", tmp_path / "out", "-dataset_json", folder / "dataset.json") == 0
    missing = tmp_path / "none.json"
    rejected(lambda: run(*words, "-o", tmp_path / "none", "-dataset_json", missing), missing, "no such file")

"""What an earlier run left is never taken for the result of this one: masks, probabilities, preprocessed cases."""

import json
import os

import numpy as np
import pytest

from tests.medseg_nnunet import FLAT, SHORT, dataset
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
pytest.importorskip("lightning")

QUIET = "--no-progress"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stale")
    dataset(folder)
    assert run("plan", "-d", 7, "--root", folder, QUIET) == 0
    assert run("preprocess", "-d", 7, "-c", "2d", "--root", folder, QUIET) == 0
    assert run("train", 7, "2d", 0, "--root", folder, "--npz", *FLAT, *SHORT) == 0
    return folder


def results(root):
    return root / "nnUNet_results/Dataset007_Bälle/nnUNetTrainerVMUNet__nnUNetPlans__2d"


def predict(root, out, *more):
    images = root / "nnUNet_raw/Dataset007_Bälle/imagesTs"
    return run("predict", "-i", images, "-o", out, "-m", results(root), "--disable_tta", "-device", "cpu", QUIET, *more)


def test_probabilities_come_and_go_with_their_masks(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(root, out) == 0 and not list(out.glob("*.npz"))
    assert predict(root, out, "--save_probabilities") == 0 and len(list(out.glob("*.npz"))) == 2
    assert "already" not in capsys.readouterr().out
    assert predict(root, out) == 0 and len(list(out.glob("*.npz"))) == 2
    text = capsys.readouterr().out
    assert "2 of 2 already predicted, kept (--overwrite replaces them)" in text
    os.utime(results(root) / "fold_0/checkpoint_final.pth")
    assert predict(root, out) == 0 and "2 of them made before their sources changed" in capsys.readouterr().out
    assert predict(root, out, "--overwrite") == 0 and not list(out.glob("*.npz"))


def test_masks_of_other_settings_are_not_taken_for_those_of_these(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(root, out) == 0
    assert "nnUNetTrainerVMUNet__nnUNetPlans__2d: fold_0/checkpoint_final.pth\n" in capsys.readouterr().out
    rejected(lambda: predict(root, out, "-step_size", 0.9), out, "step_size 0.5, now 0.9", "--overwrite")
    assert predict(root, out, "-step_size", 0.9, "--overwrite") == 0
    made = json.loads((out / "predict_from_raw_data_args.json").read_text())
    assert made["step_size"] == 0.9 and made["checkpoints"] == ["fold_0/checkpoint_final.pth"]


def test_an_ensemble_and_postprocessing_say_what_they_kept(root, tmp_path, capsys):
    one, two, both, final = (tmp_path / name for name in ("one", "two", "both", "final"))
    for folder in (one, two):
        assert predict(root, folder, "--save_probabilities") == 0
    assert run("ensemble", "-i", one, two, "-o", both, QUIET) == 0
    assert "already" not in capsys.readouterr().out
    assert run("ensemble", "-i", one, two, "-o", both, QUIET) == 0
    assert "2 of 2 already predicted, kept" in capsys.readouterr().out
    rule, other = tmp_path / "rule.json", tmp_path / "other.json"
    rule.write_text('{"steps": [[1, 2]]}')
    other.write_text('{"steps": [[2]]}')
    words = ["postprocess", "-i", both, "-o", final, QUIET, "-pp"]
    assert run(*words, rule) == 0 and run(*words, rule) == 0
    rejected(lambda: run(*words, other), final, "other steps", "--overwrite")
    assert json.loads((final / "postprocessing.json").read_text()) == {"steps": [[1, 2]]}
    assert run(*words, other, "--overwrite") == 0
    assert json.loads((final / "postprocessing.json").read_text()) == {"steps": [[2]]}


def test_validation_holds_this_split_and_this_network_only(root):
    splits = root / "nnUNet_preprocessed/Dataset007_Bälle/splits_final.json"
    before = json.loads(splits.read_text())
    folder = results(root) / "fold_0/validation"
    assert len(list(folder.glob("*.npz"))) == 1
    try:
        splits.write_text(json.dumps(before[::-1]))
        assert run("train", 7, "2d", 0, "--root", root, "--overwrite", *FLAT, *SHORT) == 0
        assert {p.name for p in folder.iterdir()} == {f"{before[-1]['val'][0]}.nii.gz", "summary.json"}
    finally:
        splits.write_text(json.dumps(before))


def test_folds_of_one_model_have_one_plan(root):
    path = root / "nnUNet_preprocessed/Dataset007_Bälle/nnUNetPlans.json"
    before = path.read_text()
    plans = json.loads(before)
    plans["configurations"]["2d"]["batch_size"] += 1
    train = ["train", 7, "2d", "--root", root, *FLAT, *SHORT, "--dry-run"]
    try:
        path.write_text(json.dumps(plans))
        rejected(lambda: run(*train[:3], 1, *train[3:]), results(root), "fold_0", "other plans")
        rejected(lambda: run(*train[:3], 0, *train[3:], "--resume"), results(root), "fold_0", "other plans")
        assert run(*train[:3], 0, 1, *train[3:]) == 0  # all of the folds that are there are trained anew
    finally:
        path.write_text(before)


def test_cases_are_preprocessed_again_when_files_or_plans_change(tmp_path):
    raw = dataset(tmp_path)
    place = ["--root", tmp_path, QUIET]
    prepare = ["preprocess", "-d", 7, "-c", "2d", *place]
    assert run("plan", "-d", 7, *place) == 0 and run(*prepare) == 0
    folder = tmp_path / "nnUNet_preprocessed/Dataset007_Bälle"
    cases = folder / "vmamba_nnUNetPlans_2d"
    times = {path.name: path.stat().st_mtime_ns for path in cases.glob("*.npy")}
    assert run(*prepare) == 0 and times == {path.name: path.stat().st_mtime_ns for path in cases.glob("*.npy")}
    os.utime(raw / "labelsTr/fäll_1.nii.gz")
    assert run(*prepare) == 0
    changed = {path.name for path in cases.glob("*.npy") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"fäll_1.npy", "fäll_1_seg.npy"}
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d"]["spacing"] = [2.0, 2.0]
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    shape = np.load(cases / "fäll_1.npy").shape
    train = ["train", 7, "2d", 0, "--root", tmp_path, *FLAT, *SHORT]
    rejected(lambda: run(*train), cases, "other plans", "preprocess")
    assert run(*prepare) == 0 and np.load(cases / "fäll_1.npy").shape[2:] < shape[2:]


def test_cases_at_a_time(tmp_path):
    """The same files whatever ``-np`` is; a broken case ends it, and those that are finished stay."""
    raw = dataset(tmp_path)
    place = ["-d", 7, "--root", tmp_path, QUIET]
    assert run("plan", *place, "--verify_dataset_integrity") == 0
    cases = tmp_path / "nnUNet_preprocessed/Dataset007_Bälle/vmamba_nnUNetPlans_2d"
    made = []
    for count in (1, 3):
        assert run("preprocess", "-c", "2d", "-np", count, "--overwrite", *place) == 0
        made.append({path.name: path.read_bytes() for path in cases.glob("*.npy")})
    assert made[0] == made[1] and len(made[0]) == 2 * len(list((raw / "labelsTr").iterdir()))
    (raw / "imagesTr/fäll_1_0000.nii.gz").write_bytes(b"broken")
    rejected(lambda: run("preprocess", "-c", "2d", "-np", 3, *place), "fäll_1_0000.nii.gz")
    assert {path.name: path.read_bytes() for path in cases.glob("*.npy")} == made[0]
    rejected(lambda: run("preprocess", "-np", 0, *place), "-np 0", "at least 1")

"""vmamba medseg find-best: models and pairs are scored by cross-validation; the written commands are followed."""

import json
import shlex
import shutil

import pytest

from tests.medseg_nnunet import DEEP, FLAT, SHORT, dataset
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
pytest.importorskip("lightning")
from vmamba.medical.evaluate import evaluate

QUIET = "--no-progress"
FOLDS = ["-f", 0, 1]
ONE, TWO = "nnUNetTrainerVMUNet__nnUNetPlans__2d", "nnUNetTrainerUMambaBot__nnUNetPlans__3d_fullres"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    dataset(folder)
    assert run("plan", "-d", 7, "--root", folder, QUIET) == 0
    assert run("preprocess", "-d", 7, "--root", folder, QUIET) == 0
    assert run("train", 7, "2d", 0, 1, "--root", folder, "--npz", *FLAT, *SHORT) == 0
    assert run("train", 7, "3d_fullres", 0, 1, "--root", folder, "--npz", *DEEP, *SHORT) == 0
    return folder


def results(root):
    return root / "nnUNet_results/Dataset007_Bälle"


def information(root):
    return json.loads((results(root) / "inference_information.json").read_text())


def follow(root, tmp_path):
    """Runs the written commands on the training images; the last one's folder."""
    text = (results(root) / "inference_instructions.txt").read_text()
    text = text.replace("INPUT_FOLDER", str(root / "nnUNet_raw/Dataset007_Bälle/imagesTr"))
    lines = [line for line in text.replace("OUTPUT_FOLDER", str(tmp_path / "o")).splitlines() if line[:6] == "vmamba"]
    for line in lines:
        words = shlex.split(line)
        more = ["--root", root, "--disable_tta", "-device", "cpu"] if words[2] == "predict" else []
        assert run(*words[2:], *more, QUIET) == 0
    return len(lines), tmp_path / "o_PP"


def test_pairs_are_compared(root, tmp_path, capsys):
    assert run("find-best", 7, *FOLDS, "--root", root, QUIET) == 0
    found, text = information(root), capsys.readouterr().out
    pair = f"ensemble___{TWO}___{ONE}"
    assert set(found["all_results"]) == {ONE, TWO, pair} and found["folds"] == ["0", "1"]
    best = max(found["all_results"], key=found["all_results"].get)
    chosen = found["best_model_or_ensemble"]
    assert chosen["result_on_crossval_pre_pp"] == found["all_results"][best] <= chosen["result_on_crossval_post_pp"]
    assert f"Best in cross-validation: {best}" in text and f"{found['all_results'][best]:.4f}  {best}" in text
    folder = results(root) / "ensembles" / f"{pair}___0_1"
    truth = root / "nnUNet_raw/Dataset007_Bälle/labelsTr"
    kept = tmp_path / "truth"
    kept.mkdir()
    for path in folder.glob("*.nii.gz"):
        shutil.copy(truth / path.name, kept)
    again = evaluate(kept, folder, progress=False)
    assert again["foreground_mean"]["Dice"] == pytest.approx(found["all_results"][pair])
    count, output = follow(root, tmp_path)
    assert count == 1 + len(chosen["selected_model_or_models"]) + (best == pair) and list(output.glob("*.nii.gz"))


def test_masks_of_pairs_are_kept_if_asked(root, capsys):
    words = ["find-best", 7, *FOLDS, "--root", root, QUIET, "-np", 2]
    assert run(*words) == 0
    masks = sorted(results(root).glob("ensembles/*/*.nii.gz"))
    times, before = [path.stat().st_mtime_ns for path in masks], information(root)
    capsys.readouterr()
    assert run(*words, "--no_overwrite") == 0 and times == [path.stat().st_mtime_ns for path in masks] != []
    assert f"{len(masks)} of {len(masks)} already predicted, kept (--" in capsys.readouterr().out  # and are not older
    assert information(root) == before
    assert run(*words) == 0 and times != [path.stat().st_mtime_ns for path in masks]


def test_a_pair_that_is_best(root, tmp_path, monkeypatch):
    """Its post-processing is chosen from its own masks, and three commands become four."""
    from vmamba.medical import find_best as module

    original = module._pair

    def better(*args):
        found = original(*args)
        return module.Candidate(found.models, found.folder, 2.0)

    monkeypatch.setattr(module, "_pair", better)
    assert run("find-best", 7, *FOLDS, "--root", root, QUIET) == 0
    best = information(root)["best_model_or_ensemble"]
    assert [m["configuration"] for m in best["selected_model_or_models"]] == ["3d_fullres", "2d"]
    assert "ensembles/" in best["postprocessing_file"]
    count, output = follow(root, tmp_path)
    assert count == 4 and list(output.glob("*.nii.gz"))


def test_single_models_and_refusals(root):
    words = ["find-best", 7, "--root", root, QUIET]
    rejected(lambda: run(*words), "not validated")
    rejected(lambda: run(*words, *FOLDS, "-tr", "nnUNetTrainerMHSUNet"), "nnUNetTrainerMHSUNet not trained", ONE)
    rejected(lambda: run(*words, *FOLDS, "-c", "3d_lowres"), "3d_lowres not trained")
    rejected(lambda: run(*words, "-p", "other"), "nothing trained by the plans other")
    kept = next(results(root).glob(f"{ONE}/fold_0/validation/*.npz"))
    moved = kept.rename(kept.with_suffix(".gone"))
    for path in results(root).glob(f"{ONE}/crossval_results_folds_0_1/*.npz"):
        path.unlink()
    rejected(lambda: run(*words, *FOLDS), "were not kept", "--disable_ensembling")
    assert run(*words, *FOLDS, "--disable_ensembling") == 0
    found = information(root)
    assert set(found["all_results"]) == {ONE, TWO} and not found["ensembling_allowed"]
    moved.rename(kept)

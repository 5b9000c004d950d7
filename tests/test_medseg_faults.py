"""What can go wrong with files and folders: one line, exit code 2, and nothing that was there is changed."""

import errno
import json
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from tests.medseg_nnunet import FLAT, REGIONS, SHORT, dataset, save, write_description

pytest.importorskip("monai")
pytest.importorskip("lightning")
from vmamba import safety
from vmamba.errors import UserError
from vmamba.tools.cli import main

QUIET = "--no-progress"
CASE = "imagesTr/fäll_1_0000.nii.gz"
LABEL = "labelsTr/fäll_1.nii.gz"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A planned data set with two channels and a trained fold, under a path with a blank and an umlaut."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("made once") / "Würfel ß"
    dataset(root, channels=2)
    for words in (["plan", "-d", "7", QUIET], ["preprocess", "-d", "7", "-c", "2d", QUIET],
                  ["train", "7", "2d", "0", *FLAT, *SHORT]):  # fmt: skip
        assert main(["medseg", *words, "--root", str(root)]) == 0
    yield root
    torch.set_num_threads(before)


@pytest.fixture
def root(origin, tmp_path):
    """A copy of it."""
    return shutil.copytree(origin, tmp_path / "Würfel ß")


def call(*words):
    return main(["medseg", *map(str, words)])


def snapshot(folder):
    """{file: content} without locks."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != safety.LOCK
    }


def refused(root, capsys, words, *parts):
    """Checks exit code 2, the one line with ``parts``, and that nothing in ``root`` has changed."""
    before = snapshot(root)
    capsys.readouterr()
    assert call(*words) == 2
    line = capsys.readouterr().err
    assert line.startswith("vmamba: error: ") and line.count("\n") == 1, line
    for part in parts:
        assert str(part) in line, line
    assert snapshot(root) == before


def raw(root):
    return root / "nnUNet_raw/Dataset007_Bälle"


def affine(folder):
    image = nibabel.load(folder / CASE)
    moved = image.affine.copy()
    moved[0, 3] += 5
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(), moved), folder / CASE)


def values(folder):
    save(folder / LABEL, np.asanyarray(nibabel.load(folder / LABEL).dataobj) * 3)


def nan(folder):
    data = nibabel.load(folder / CASE).get_fdata()
    data[1, 2, 3] = np.nan
    save(folder / CASE, data)


def four(folder):
    save(folder / CASE, np.stack([nibabel.load(folder / CASE).get_fdata()] * 2, -1))


def spacing(folder):
    image = nibabel.load(folder / CASE)
    save(folder / CASE, image.get_fdata(), (1.0, 1.0, 4.0))


def size(folder):
    save(folder / LABEL, np.asanyarray(nibabel.load(folder / LABEL).dataobj)[:-1])


def empty(folder):
    for path in folder.glob("labelsTr/*"):
        save(path, 0 * np.asanyarray(nibabel.load(path).dataobj))


def truncated(folder):
    whole = (folder / CASE).read_bytes()
    (folder / CASE).write_bytes(whole[: len(whole) // 2])


def gap(folder):
    write_description(folder, {"background": 0, "a": 1, "b": 3}, 5, 2)


def unordered(folder):
    data = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**data, "labels": REGIONS, "regions_class_order": [1]}))


# what is done to the data set -> what the line says
FAULTS = {
    "affine": (affine, ["fäll_1_000", "affine differs", "row 1, column 4"]),
    "spacing": (spacing, ["fäll_1_000", "affine differs", "resample"]),
    "missing channel": (lambda f: (f / CASE).unlink(), ["fäll_1_0000.nii.gz is missing", "2 channel(s)"]),
    "missing label": (lambda f: (f / LABEL).unlink(), [CASE.split("/")[1], "without label"]),
    "missing image": (lambda f: [p.unlink() for p in f.glob("imagesTr/fäll_1_*")], [LABEL, "without image"]),
    "no channel number": (lambda f: (f / CASE).rename(f / "imagesTr/other.nii.gz"), ["other.nii.gz", "other_0000"]),
    "label values": (values, [LABEL, "3, 6", "0, 1, 2"]),
    "label size": (size, [LABEL, "differs from"]),
    "NaN": (nan, [CASE, "NaN"]),
    "4D": (four, [CASE, "one file per channel"]),
    "empty masks": (empty, ["labelsTr", "every label is empty"]),
    "zero-size file": (lambda f: (f / CASE).write_bytes(b""), [CASE, "0 bytes"]),
    "truncated gzip": (truncated, [CASE, "cannot be read", "complete"]),
    "gap in the labels": (gap, ["dataset.json", "[1, 3]", "consecutive"]),
    "regions without order": (unordered, ["dataset.json", "2 regions", "regions_class_order"]),
    "no dataset.json": (lambda f: (f / "dataset.json").unlink(), ["dataset.json", "no such file"]),
    "broken dataset.json": (lambda f: (f / "dataset.json").write_text("{"), ["dataset.json", "JSON"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_data_set(root, capsys, name):
    spoil, parts = FAULTS[name]
    spoil(raw(root))
    refused(root, capsys, ["plan", "-d", 7, "--root", root, "--overwrite", QUIET], *parts)


def test_a_data_set_that_does_not_exist(root, capsys):
    for words in (["plan", "-d", 8], ["train", 8, "2d", 0], ["preprocess", "-d", "Dataset008_X"]):
        refused(root, capsys, [*words, "--root", root], "8", "Dataset007_Bälle")
    refused(root, capsys, ["train", 7, "4d", 0, "--root", root], "4d", "3d_fullres")
    refused(root, capsys, ["train", 7, "3d_fullres", 0, "--root", root], "preprocess")
    refused(root, capsys, ["train", 7, "2d", "x", "--root", root], "'x'", "all")
    refused(root, capsys, ["train", 7, "2d", 0, "--root", root, "--lr", -1], "--lr -1")
    refused(root, capsys, ["train", 7, "2d", 0, "--root", root, "--axis", 1], "--axis", "without DATASET")
    refused(root, capsys, ["train", 7, "--root", root], "DATASET CONFIG FOLD")
    refused(root, capsys, ["predict", "-i", raw(root), "-o", root / "o", "-d", 7, "-c", "2d", "--root", root],
            "nnUNetTrainerUMambaBot__nnUNetPlans__2d", "nnUNetTrainerVMUNet__nnUNetPlans__2d")  # fmt: skip


def test_one_empty_mask_is_no_fault(root):
    label = raw(root) / LABEL
    save(label, 0 * np.asanyarray(nibabel.load(label).dataobj))
    assert call("plan", "-d", 7, "--root", root, "--overwrite", QUIET) == 0
    assert call("preprocess", "-d", 7, "-c", "2d", "--root", root, "--overwrite", QUIET) == 0
    words = ["evaluate", raw(root) / "labelsTr", raw(root) / "labelsTr", "-o", root / "s.json", QUIET]
    assert call(*words) == 0
    cases = json.loads((root / "s.json").read_text())["metric_per_case"]
    assert [case["metrics"]["1"]["Dice"] for case in cases] == [1, None, 1, 1, 1]


def test_transparent_pictures(tmp_path, capsys):
    folder = dataset(tmp_path, ending=".png")
    path = folder / "imagesTr/fäll_1_0000.png"
    grey = np.asarray(Image.open(path))
    Image.fromarray(np.stack([grey, grey, grey, grey // 2], -1)).save(path)
    refused(tmp_path, capsys, ["plan", "-d", 7, "--root", tmp_path, QUIET], path, "transparent", "RGBA")
    Image.fromarray(np.stack([grey, grey, grey, 0 * grey + 255], -1)).save(path)
    refused(tmp_path, capsys, ["plan", "-d", 7, "--root", tmp_path, QUIET], path, "3 channel(s)", "names 1")


def predict(root, output, *more):
    model = root / "nnUNet_results/Dataset007_Bälle/nnUNetTrainerVMUNet__nnUNetPlans__2d"
    return ["predict", "-i", raw(root) / "imagesTs", "-o", output, "-m", model, "--device", "cpu", QUIET, *more]


def test_faults_of_prediction(root, capsys):
    folder = raw(root) / "imagesTs"
    assert call(*predict(root, root / "out")) == 0
    refused(root, capsys, predict(root, folder), folder, "another output folder")
    refused(root, capsys, predict(root, root / "out/plans.json"), "plans.json")
    (folder / "fäll_6_0001.nii.gz").unlink()
    refused(root, capsys, predict(root, root / "out", "--overwrite"), "fäll_6_0001.nii.gz is missing")
    shutil.rmtree(folder)
    refused(root, capsys, predict(root, root / "out"), folder, "no such folder")


@pytest.mark.parametrize("name", ["affine", "NaN", "4D", "zero-size file", "truncated gzip"])
def test_faults_of_images_to_predict(root, capsys, name):
    assert call(*predict(root, root / "out")) == 0
    for path in raw(root).glob("imagesTs/fäll_5_*"):
        path.rename(path.with_name(path.name.replace("5", "1")))
    spoil, parts = FAULTS[name]
    folder = root / "new"
    shutil.copytree(raw(root) / "imagesTs", folder / "imagesTr")
    spoil(folder)
    words = predict(root, root / "out")
    words[words.index("-i") + 1] = folder / "imagesTr"
    refused(root, capsys, words, *[part for part in parts if part != "one file per channel"])
    assert len(list((root / "out").glob("*.nii.gz"))) == 2


@pytest.mark.parametrize("name", ["affine", "spacing", "size", "NaN", "truncated", "zero-size"])
def test_faults_of_masks_to_score(root, capsys, name):
    truth, guess = raw(root) / "labelsTr", shutil.copytree(raw(root) / "labelsTr", root / "guess")
    path = guess / "fäll_1.nii.gz"
    image = nibabel.load(path)
    data = np.asanyarray(image.dataobj).astype(np.float32)
    shifted = image.affine.copy()
    shifted[0, 3] += 5
    spoil, part = {
        "affine": (lambda: nibabel.save(nibabel.Nifti1Image(data, shifted), path), "affine differs"),
        "spacing": (lambda: save(path, data, (1.0, 1.0, 4.0)), "spacing"),
        "size": (lambda: save(path, data[1:]), "differs from"),
        "NaN": (lambda: save(path, data / 0), "NaN"),
        "truncated": (lambda: path.write_bytes(path.read_bytes()[:99]), "cannot be read"),
        "zero-size": (lambda: path.write_bytes(b""), "0 bytes"),
    }[name]
    with np.errstate(all="ignore"):
        spoil()
    for more in ([], ["--convention", "synapse"]):
        refused(root, capsys, ["evaluate", truth, guess, "-o", root / "s.json", QUIET, *more], "fäll_1.nii.gz", part)


@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only")])
def test_a_disk_that_refuses(root, capsys, monkeypatch, number, reason):
    assert call(*predict(root, root / "out")) == 0
    write = nibabel.save

    def fails(image, path):
        path.write_bytes(b"half")  # what a full disk leaves behind
        raise OSError(number, f"{reason} on device", str(path))

    monkeypatch.setattr(nibabel, "save", fails)
    refused(root, capsys, predict(root, root / "out", "--overwrite"), reason, "nothing that was there")
    monkeypatch.setattr(nibabel, "save", write)
    monkeypatch.setattr(np, "save", lambda path, _: fails(None, path))
    refused_again = ["preprocess", "-d", 7, "-c", "3d_fullres", "--root", root, QUIET]
    refused(root, capsys, refused_again, reason)


def test_a_folder_that_cannot_be_made(root, capsys, monkeypatch):
    from pathlib import Path

    def fails(self, *args, **kwargs):
        raise OSError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", fails)
    refused(root, capsys, predict(root, root / "new"), root / "new", "Permission denied")


def test_a_checkpoint_that_does_not_fit_on_the_disk(root, capsys, monkeypatch):
    def fails(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", fails)
    fold = root / "nnUNet_results/Dataset007_Bälle/nnUNetTrainerVMUNet__nnUNetPlans__2d/fold_0"
    before = snapshot(raw(root))
    assert call("train", 7, "2d", 1, "--root", root, *FLAT, *SHORT) == 2
    assert "space left" in capsys.readouterr().err and snapshot(raw(root)) == before
    assert (fold / "checkpoint_final.pth").stat().st_size > 1000
    assert not list(fold.parent.glob("fold_1/*.pth")) and not list(fold.parent.glob("fold_1/.partial*"))


def system(number, path=None):
    return OSError(number, "so it is", *([str(path)] if path else []))


def test_what_the_system_refuses_in_words(tmp_path, monkeypatch):
    secret = tmp_path / "secret.png"
    secret.touch()
    monkeypatch.setattr(safety.os, "access", lambda path, _: str(path) != str(secret))
    cases = {
        system(errno.ENOSPC): f"{tmp_path}: cannot be written (so it is); {safety.UNHARMED}",
        system(errno.EROFS, "a/b.png"): f"a/b.png: cannot be written (so it is); {safety.UNHARMED}",
        system(errno.EACCES, tmp_path): f"{tmp_path}: cannot be written (so it is); {safety.UNHARMED}",
        system(errno.EACCES, secret): f"{secret}: cannot be read (so it is); change its permissions or copy it",
        system(errno.ENOENT, "a/b.png"): "a/b.png: so it is",
        system(errno.EIO, "a/b.png"): "a/b.png: so it is",
        system(errno.EMFILE): "the system refused: so it is",
        system(errno.EADDRINUSE): "the system refused: so it is",
    }
    for error, line in cases.items():
        with pytest.raises(UserError) as caught, safety.refusals(tmp_path):
            raise error
        assert str(caught.value) == line
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. GPU 0 has ...")
    with pytest.raises(UserError, match=r"^CUDA out of memory; a smaller --batch-size"), safety.refusals(tmp_path):
        raise full
    for error in (OSError("a library's"), BrokenPipeError(errno.EPIPE, "enough"), RuntimeError("no file")):
        with pytest.raises(type(error)) as caught, safety.refusals(tmp_path):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("name", safety.RANKS)
def test_processes_of_one_training_share_its_folder(tmp_path, monkeypatch, name):
    with safety.only_writer(tmp_path):
        with pytest.raises(UserError, match="another process"), safety.only_writer(tmp_path):
            pass
        monkeypatch.setenv(name, "1")
        with safety.only_writer(tmp_path):
            pass


@pytest.fixture
def without_splits(root):
    (splits,) = root.glob("nnUNet_preprocessed/*/splits_final.json")
    stored = splits.read_bytes()
    splits.unlink()
    yield
    splits.write_bytes(stored)


def test_dry_runs_print_the_plan_and_write_nothing(root, capsys, without_splits):
    before, place = snapshot(root), ["--root", root]
    assert call("plan", "-d", 7, *place, "--dry-run", QUIET) == 0
    small = capsys.readouterr().out
    assert call("plan", "-d", 7, *place, "--dry-run", "-gpu_memory_target", 0.01, QUIET) == 0
    assert capsys.readouterr().out != small and "3d_fullres" in small
    assert call("train", 7, "2d", 0, 1, *place, *FLAT, *SHORT, "--dry-run") == 0
    text = capsys.readouterr().out
    assert text.count("4 case(s) to train, 1 to validate") == 2 and "2 stages" in text and "GiB" in text
    assert "adamw 0.003" in text and "2 epochs of 3 + 1 steps" in text and snapshot(root) == before


def test_an_interrupted_prediction_goes_on(root, capsys, monkeypatch):
    from vmamba.medical import fold_predict

    write, done = fold_predict.save_case, []

    def stops(target, *rest, **options):
        if done:
            raise KeyboardInterrupt
        done.append(target)
        write(target, *rest, **options)

    monkeypatch.setattr(fold_predict, "save_case", stops)
    assert call(*predict(root, root / "out")) == 130
    assert "goes on" in capsys.readouterr().err and done[0].exists()
    assert not list((root / "out").glob(".partial*")) and len(list((root / "out").glob("*.nii.gz"))) == 1
    first = done[0].read_bytes(), done[0].stat().st_mtime_ns
    monkeypatch.setattr(fold_predict, "save_case", write)
    assert call(*predict(root, root / "out")) == 0
    assert (done[0].read_bytes(), done[0].stat().st_mtime_ns) == first and "1 of 2 already" in capsys.readouterr().out
    assert len(list((root / "out").glob("*.nii.gz"))) == 2


def test_two_processes_on_one_folder(root, capsys):
    (root / "out").mkdir()
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
    code += "print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(root / "out" / safety.LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        refused(root, capsys, predict(root, root / "out"), root / "out", "another process")
        other.communicate("")
    assert call(*predict(root, root / "out")) == 0


def test_faults_of_ensembles_and_postprocessing(root, capsys):
    out = root / "out"
    assert call(*predict(root, out)) == 0
    refused(root, capsys, ["ensemble", "-i", out, out, "-o", root / "e"], "fäll_5.npz", "--save_probabilities")
    refused(root, capsys, ["ensemble", "-i", out, "-o", root / "e"], "at least two")
    refused(root, capsys, ["postprocess", "-i", out, "-o", out, "-pp", out / "plans.json"], "no steps")
    (root / "rule.json").write_text('{"steps": []}')
    refused(root, capsys, ["postprocess", "-i", out, "-o", out, "-pp", root / "rule.json"], "another output folder")
    refused(root, capsys, ["postprocess", "-i", out, "-o", root / "e", "-ref", root], root, "no mask")
    refused(root, capsys, ["plot", "-i", raw(root) / "imagesTr", "-p", out, "-o", root / "e"], "no image")
    save(out / "fäll_5.nii.gz", np.full(nibabel.load(out / "fäll_5.nii.gz").shape, 9, np.uint8))
    words = ["evaluate", raw(root) / "labelsTs", out, "-djfile", raw(root) / "dataset.json", QUIET]
    refused(root, capsys, words, "fäll_5.nii.gz", "9", "0, 1, 2")
    (out / "fäll_6.npz").write_bytes(b"no")
    (out / "fäll_5.npz").write_bytes(b"no")
    refused(root, capsys, ["ensemble", "-i", out, out, "-o", root / "e", QUIET], "fäll_5.npz", "probabilities")

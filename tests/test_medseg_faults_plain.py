"""What can go wrong with plain folders: one line, exit code 2, and nothing that was there is changed."""

import errno
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from tests.medseg_data import AFFINE, TINY, save_volume, volumes
from tests.test_medseg_faults import call, refused, snapshot

pytest.importorskip("monai")
pytest.importorskip("lightning")
from vmamba import safety
from vmamba.medical import predict as prediction

QUICK = ["--accelerator", "cpu", "--no-progress", "--batch-size", 4, "--epochs", 1]
QUICK += [word for key, value in TINY.items() for word in ("--set", f"{key}={str(value).strip('[]')}")]


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Volumes and a run on them, under a path with a blank and an umlaut."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("made once") / "Würfel ß"
    data = volumes(root / "däta", 3)
    assert call("train", "--data", data, "-o", root / "run", *QUICK) == 0
    yield root
    torch.set_num_threads(before)


@pytest.fixture
def root(origin, tmp_path):
    return shutil.copytree(origin, tmp_path / "Würfel ß")


def train(root, *more):
    return ["train", "--data", root / "däta", "-o", root / "new", *QUICK, *more]


def predict(root, *more):
    images = root / "däta/images"
    return ["predict", "-i", images, "-m", root / "run", "-o", root / "out", "--device", "cpu", "--no-progress", *more]


def again(path, change, affine=AFFINE):
    save_volume(path, change(np.asanyarray(nibabel.load(path).dataobj)), affine)


def nan(data):
    out = data.astype(np.float32)
    out[1, 2, 3] = np.nan
    return out


def moved():
    affine = AFFINE.copy()
    affine[1, 3] += 9
    return affine


CASE, LABEL = "däta/images/v0_0000.nii.gz", "däta/labels/v0.nii.gz"
IMAGES = {  # what is done to an image -> what the line says
    "NaN": (lambda p: again(p, nan), "NaN"),
    "4D": (lambda p: again(p, lambda x: np.stack([x, x], -1)), "channel(s)"),
    "5D": (lambda p: again(p, lambda x: np.stack([np.stack([x, x], -1)] * 2, -1)), "(28, 36, 6, 2, 2)"),
    "zero-size file": (lambda p: p.write_bytes(b""), "0 bytes"),
    "truncated gzip": (lambda p: p.write_bytes(p.read_bytes()[:2000]), "cannot be read"),
}
PAIRS = {  # what is done to a data set -> what the line says
    "affine": (lambda root: again(root / CASE, np.array, moved()), ["affine differs", "row 2, column 4"]),
    "channels' affines": (
        lambda root: (
            [save_volume(root / CASE.replace("_0000", "_0001"), np.zeros((28, 36, 6)), moved())]
            + [
                shutil.copy(root / f"däta/images/v{i}_0000.nii.gz", root / f"däta/images/v{i}_0001.nii.gz")
                for i in (1, 2)
            ]
        ),
        ["v0_0001.nii.gz", "affine differs"],
    ),
    "label values": (lambda root: again(root / LABEL, lambda x: 5 * x), ["v0.nii.gz", "class 3 is missing"]),
    "NaN in a label": (lambda root: again(root / LABEL, nan), ["v0.nii.gz", "NaN"]),
    "all masks empty": (
        lambda root: [again(p, np.zeros_like) for p in (root / "däta/labels").iterdir()],
        ["value 0 only", "at least two classes"],
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_faults_of_images(root, capsys, name):
    assert call(*predict(root)) == 0
    spoil, part = IMAGES[name]
    spoil(root / CASE)
    refused(root, capsys, predict(root, "--overwrite"), "v0_0000.nii.gz", part)
    refused(root, capsys, train(root), part)
    assert not (root / "new").exists()


@pytest.mark.parametrize("name", PAIRS)
def test_faults_of_a_data_set(root, capsys, name):
    spoil, parts = PAIRS[name]
    spoil(root)
    refused(root, capsys, train(root), *parts)
    refused(root, capsys, [*train(root, "--overwrite"), "-o", root / "run"], *parts)
    assert not (root / "new").exists()


def test_one_empty_mask_is_no_fault(root):
    again(root / LABEL, np.zeros_like)
    assert call(*train(root)) == 0


def test_two_processes_on_one_folder(root, capsys):
    code = "import filelock, sys\nlocks = [filelock.FileLock(p) for p in sys.argv[1:]]\n"
    code += "for lock in locks: lock.acquire()\nprint('held', flush=True); sys.stdin.read()"
    held = [root / "out", root / "run"]
    held[0].mkdir()
    words = [sys.executable, "-c", code, *(str(folder / safety.LOCK) for folder in held)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        refused(root, capsys, predict(root), root / "out", "another process")
        refused(root, capsys, [*train(root, "--overwrite"), "-o", root / "run"], root / "run", "another process")
        refused(root, capsys, ["train", "-o", root / "run", "--resume", "--no-progress"], "another process")
        other.communicate("")
    assert call(*predict(root)) == 0


@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only")])
def test_a_disk_that_refuses(root, capsys, monkeypatch, number, reason):
    assert call(*predict(root, "--save-probabilities", "--overlay")) == 0

    def fails(path, *_, **__):
        path.write_bytes(b"half")  # what a full disk leaves behind
        raise OSError(number, f"{reason} on device", str(path))

    for module, name in ((np, "savez_compressed"), (prediction, "save_overlay"), (prediction, "write_mask")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails if name != "write_mask" else lambda *_: fails(root / "out/.partial-x"))
            words = predict(root, "--save-probabilities", "--overlay", "--overwrite")
            before = {p: d for p, d in snapshot(root).items() if ".partial-x" not in p}
            capsys.readouterr()
            assert call(*words) == 2
            line = capsys.readouterr().err
            assert reason in line and safety.UNHARMED in line and line.count("\n") == 1
            assert {p: d for p, d in snapshot(root).items() if ".partial-x" not in p} == before


def test_an_interrupted_prediction_goes_on(root, capsys, monkeypatch):
    write, done = prediction.write_mask, []

    def stops(target, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(target)
        write(target, *rest)

    monkeypatch.setattr(prediction, "write_mask", stops)
    assert call(*predict(root)) == 130 and "goes on" in capsys.readouterr().err
    assert [p.name for p in sorted((root / "out").iterdir())] == [safety.LOCK, done[0].name]
    first = done[0].stat().st_mtime_ns
    monkeypatch.setattr(prediction, "write_mask", write)
    assert call(*predict(root)) == 0 and "1 of 3 already predicted" in capsys.readouterr().out
    assert done[0].stat().st_mtime_ns == first and len(list((root / "out").glob("*.nii.gz"))) == 3


def test_pictures_with_transparency(root, capsys):
    for sub in ("images", "labels"):
        (root / "p" / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(2):
        colour = rng.integers(0, 200, (32, 32, 4)).astype(np.uint8)
        Image.fromarray(colour).save(root / f"p/images/ä{i}.png")
        Image.fromarray((colour[..., 0] > 99).astype(np.uint8)).save(root / f"p/labels/ä{i}.png")
    words = ["train", "--data", root / "p", "-o", root / "new", *QUICK]
    refused(root, capsys, words, "ä0.png", "transparent", "RGBA")
    for path in (root / "p/images").iterdir():
        Image.fromarray(np.dstack([np.asarray(Image.open(path))[..., :3], np.full((32, 32), 255, np.uint8)])).save(path)
    assert call(*words) == 0

"""Cases several at a time: the same files as one at a time, errors of the first in order, and really together."""

import json
import threading
import time

import nibabel
import numpy as np
import pytest
import torch

from tests.medseg_nnunet import dataset
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
from vmamba.medical import conventions, ensemble, evaluate, fingerprint, fold_predict, postprocess, preprocess
from vmamba.medical.fold_module import FoldSettings
from vmamba.medical.jobs import open_job
from vmamba.medical.model_folder import save_model
from vmamba.medical.networks import build
from vmamba.medical.raw import Places
from vmamba.medical.several import behind, in_order

QUIET = "--no-progress"
NAME = "Dataset007_Bälle"
WAIT = 30  # seconds until a test says that threads did not meet
pytestmark = pytest.mark.usefixtures("one_thread")


def together(monkeypatch, module, name, count):
    """The first ``count`` calls of a function wait for each other, in vain if there are fewer threads."""
    original, barrier, left = getattr(module, name), threading.Barrier(count), iter(range(count))

    def meets(*args, **options):
        if next(left, None) is not None:
            barrier.wait(WAIT)
        return original(*args, **options)

    monkeypatch.setattr(module, name, meets)


def files(folder):
    """What the folder's files hold, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def test_results_are_in_order_and_errors_are_the_first():
    def slow(n):
        time.sleep(0.02 * (n % 3 == 0))
        if n in (7, 8):
            raise ValueError(n)
        return n * n

    for threads in (0, 1, 4):
        assert list(in_order(slow, range(7), threads)) == [0, 1, 4, 9, 16, 25, 36]
        with pytest.raises(ValueError, match="7"):
            list(in_order(slow, range(10), threads))
        assert list(in_order(slow, [], threads)) == []


def test_no_more_is_begun_than_allowed():
    begun, gate = [], threading.Event()

    def work(n):
        begun.append(n)
        if n == 3:
            gate.wait(WAIT)
        return n

    results = in_order(work, range(9), 2, 2)
    assert next(results) == 0 and set(begun) <= {0, 1, 2}
    assert next(results) == 1 and max(begun) <= 3
    gate.set()
    results.close()
    begun.clear()
    lazy = in_order(work, range(9), 0)
    assert next(lazy) == 0 and begun == [0]


def test_work_left_behind():
    """It goes on beside the caller, waits where as many are unfinished, and its errors are not lost."""
    barrier, done = threading.Barrier(2), []
    with behind(1) as begin:
        begin(barrier.wait, WAIT)
        barrier.wait(WAIT)  # a begin that did the work itself would still wait
        begin(lambda: time.sleep(0.05) or done.append(1))
        begin(done.append, 2)
        assert done[:1] == [1]
    assert done == [1, 2]

    def fails():
        raise ValueError("disk")

    for count in (0, 1, 2):
        with pytest.raises(ValueError, match="disk"), behind(count) as begin:
            begin(fails)
    with pytest.raises(ValueError, match="disk"), behind(1) as begin:
        begin(fails)
        begin(done.append, 3)
    assert done == [1, 2]


def test_fingerprint(tmp_path, monkeypatch):
    folder = dataset(tmp_path, channels=2, test=0)
    made, words = [], ["plan", "-d", 7, "--root", tmp_path, QUIET, "--overwrite"]
    for count in (1, 3):
        if count > 1:
            together(monkeypatch, fingerprint, "read_case", count)
        assert run(*words, "-npfp", count) == 0
        made.append(files(tmp_path / "nnUNet_preprocessed" / NAME))
    assert made[0] == made[1] and len(made[0]) == 3
    for i in (1, 3):
        (folder / f"imagesTr/fäll_{i}_0000.nii.gz").write_bytes(b"broken")
    rejected(lambda: run(*words, "-npfp", 3), "fäll_1_0000.nii.gz")
    rejected(lambda: run(*words, "-npfp", 0), "-npfp 0", "at least 1")
    assert files(tmp_path / "nnUNet_preprocessed" / NAME) == made[0]


def test_preprocess_takes_a_number_for_each_configuration(tmp_path, monkeypatch):
    dataset(tmp_path, test=0, cases=3)
    place = ["-d", 7, "--root", tmp_path, QUIET]
    assert run("plan", *place) == 0
    rejected(lambda: run("preprocess", "-np", 1, 2, 3, *place), "-np 1 2 3", "2d, 3d_fullres")
    counts, original = [], preprocess.in_order

    def noted(work, items, threads):
        counts.append(threads)
        return original(work, items, threads)

    monkeypatch.setattr(preprocess, "in_order", noted)
    assert run("preprocess", "-np", 2, 1, *place) == 0 and run("preprocess", "-np", 3, *place) == 0
    assert counts == [2, 1, 3, 3]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set, and a network for it with weights as they begin."""
    folder = tmp_path_factory.mktemp("several")
    raw = dataset(folder, test=4)
    assert run("plan", "-d", 7, "--root", folder, QUIET) == 0
    job = open_job(Places.find(folder), "7", "2d", "nnUNetTrainerVMUNet", "nnUNetPlans")
    (job.folder / "fold_0").mkdir(parents=True)
    (job.folder / "plans.json").write_text(json.dumps(job.plans))
    (job.folder / "dataset.json").write_bytes((raw / "dataset.json").read_bytes())
    small = {"dims": [8, 16], "depths": [1, 1], "depths_decoder": [1, 1]}
    settings = FoldSettings(trainer="nnUNetTrainerVMUNet", network=small)
    torch.manual_seed(0)
    network = build(settings.trainer, job.configuration, 1, 3, small)
    state = {"trainer_name": settings.trainer, "settings": settings.as_dict()}
    save_model(job.folder / "fold_0/checkpoint_final.pth", network, state)
    return folder


def predict(root, out, *more):
    images, model = root / f"nnUNet_raw/{NAME}/imagesTs", root / f"nnUNet_results/{NAME}"
    words = ["-m", model / "nnUNetTrainerVMUNet__nnUNetPlans__2d", "-device", "cpu", "--save_probabilities"]
    return run("predict", "-i", images, "-o", out, *words, *more)


def test_reading_and_writing_beside_the_network(root, tmp_path, monkeypatch):
    made = []
    for readers, writers in ((0, 0), (1, 1), (3, 2)):
        with monkeypatch.context() as patch:
            if readers > 1:
                together(patch, fold_predict, "read_volume", readers)
                together(patch, fold_predict, "save_case", writers)
            out = tmp_path / f"{readers}"
            assert predict(root, out, "-npp", readers, "-nps", writers, "--disable_progress_bar") == 0
        made.append(files(out))
    assert made[0].keys() == made[1].keys() == made[2].keys() and len(made[0]) == 3 + 2 * 4
    for name in made[0]:
        if name.endswith(".npz"):  # its entry has the time
            maps = [np.load(tmp_path / f"{n}" / name)["probabilities"] for n in (0, 1, 3)]
            assert np.array_equal(maps[0], maps[1]) and np.array_equal(maps[0], maps[2])
        else:
            assert made[0][name] == made[1][name] == made[2][name]
    for flag in ("-npp", "-nps"):
        rejected(lambda f=flag: predict(root, tmp_path / "none", f, -1), f"{flag} -1", "at least 0")


def test_a_mask_that_cannot_be_written_ends_the_prediction(root, tmp_path, monkeypatch):
    write = fold_predict.save_case

    def fails(target, *rest):
        if target.name.startswith("fäll_6"):
            raise OSError(28, "No space left on device", str(target))
        write(target, *rest)

    monkeypatch.setattr(fold_predict, "save_case", fails)
    rejected(lambda: predict(root, tmp_path / "out", QUIET), "fäll_6", "No space left")
    there = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert "fäll_5.nii.gz" in there and "fäll_6.nii.gz" not in there and len(there) < 4
    monkeypatch.setattr(fold_predict, "save_case", write)
    assert predict(root, tmp_path / "out", QUIET) == 0 and len(list((tmp_path / "out").glob("*.nii.gz"))) == 4


@pytest.fixture
def predicted(root, tmp_path):
    """Two folders of masks with probabilities."""
    rng, found = np.random.default_rng(0), []
    for name in ("one", "two"):
        found.append(tmp_path / name)
        found[-1].mkdir()
        for path in (root / f"nnUNet_raw/{NAME}/labelsTs").iterdir():
            truth = nibabel.load(path)
            label = np.asanyarray(truth.dataobj)
            maps = np.eye(3, dtype=np.float32)[label].transpose(3, 0, 1, 2) + 0.7 * rng.random((3, *label.shape))
            np.savez(found[-1] / path.name.replace(".nii.gz", ".npz"), probabilities=(maps / maps.sum(0)))
            nibabel.save(nibabel.Nifti1Image(maps.argmax(0).astype(np.uint8), truth.affine), found[-1] / path.name)
        (found[-1] / "dataset.json").write_bytes((root / f"nnUNet_raw/{NAME}/dataset.json").read_bytes())
    return found


WORK = {  # a function of each case, and the words
    "ensemble": (ensemble, "read_probabilities", "-i {one} {two} -o {out}"),
    "postprocess": (postprocess, "write_mask", "-i {one} -ref {truth} -o {out}"),
    "evaluate": (evaluate, "scores", "{truth} {one} -o {out}/summary.json"),
    "evaluate --convention synapse": (conventions, "check_pair", "{truth} {one} -o {out}/summary.json"),
}


@pytest.mark.parametrize("command", WORK)
def test_scores_and_masks(root, tmp_path, predicted, monkeypatch, command):
    module, function, words = WORK[command]
    made, truth = [], root / f"nnUNet_raw/{NAME}/labelsTs"
    one, two = predicted

    def work(count, out):
        filled = words.format(one=one, two=two, truth=truth, out=out)
        return run(*command.split(), *filled.split(), "-np", count, QUIET)

    for count in (1, 3):
        if count > 1:
            together(monkeypatch, module, function, count)
        assert work(count, tmp_path / f"{count}") == 0
        made.append(files(tmp_path / f"{count}"))
    assert made[0] == made[1] and len(made[0]) >= 2
    rejected(lambda: work(0, tmp_path / "none"), "-np 0", "at least 1")

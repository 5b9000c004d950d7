"""vmamba medseg from images to figures: training, resuming to the same bits, prediction in place, evaluation."""

import csv
import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from tests.medseg_data import AFFINE, TINY, pictures, save_volume, volumes
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
pytest.importorskip("lightning")
from lightning.pytorch.callbacks import Callback

from vmamba.medical.evaluate import CONVENTIONS
from vmamba.medical.predict import Predictor
from vmamba.medical.runs import load_checkpoint, resumed
from vmamba.medical.spec import Settings
from vmamba.medical.train import Hardware, Interrupted, train
from vmamba.safety import LOCK

CPU = Hardware(accelerator="cpu", devices="1", progress=False)
QUICK = ["--accelerator", "cpu", "--no-progress", "--batch-size", 4]
QUICK += [word for key, value in TINY.items() for word in ("--set", f"{key}={str(value).strip('[]')}")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A run on pictures: (data, run)."""
    folder = tmp_path_factory.mktemp("flat")
    data = pictures(folder / "data", 6)
    words = ["--epochs", 20, "--batch-size", 2, "--lr", 5e-3, "--augmentation", "mirror"]
    assert run("train", "--data", data, "-o", folder / "run", *QUICK, *words) == 0
    return data, folder / "run"


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A run on oblique volumes cut along their second axis: (data, run)."""
    folder = tmp_path_factory.mktemp("deep")
    data = volumes(folder / "data")
    assert run("train", "--data", data, "-o", folder / "run", *QUICK, "--epochs", 1, "--axis", 1) == 0
    return data, folder / "run"


def test_run_folder(flat):
    data, folder = flat
    names = {"config.json", "metrics.csv", "curves.png", "best.ckpt", "last.ckpt", "summary.json"}
    assert {path.name for path in folder.iterdir()} == {*names, LOCK}
    summary, config = (json.loads((folder / name).read_text()) for name in ("summary.json", "config.json"))
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 19
    assert torch.load(folder / "best.ckpt", weights_only=True)["epoch"] == summary["best_epoch"] - 1
    assert len(rows) == 20 and summary["epochs"] == 20 and config["settings"]["data"] == str(data)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert summary["best_val_dice"] == max(float(row["val_dice"]) for row in rows)
    assert float(rows[-1]["lr"]) == pytest.approx(1e-5)
    assert sorted(config["split"]["train"] + config["split"]["val"]) == [f"c{i}" for i in range(6)]
    assert Image.open(folder / "curves.png").size[0] > 500


def test_checkpoint_needs_no_pickled_code(flat):
    stored = torch.load(flat[1] / "last.ckpt", weights_only=True)
    spec, state = load_checkpoint(flat[1])
    assert stored["hyper_parameters"]["spec"] == spec.as_dict() and set(stored["state_dict"]) == {
        f"network.{k}" for k in state
    }
    assert spec.values == [0, 255] and spec.channels == 3 and spec.patch == [32, 64] and spec.model == "vmunet"


def test_pictures_predict_and_evaluate(flat, tmp_path, capsys):
    data, folder = flat
    out = tmp_path / "out"
    words = ["predict", "-i", data / "images", "-m", folder, "-o", out, "--no-progress", "--device", "cpu"]
    assert run(*words, "--overlay", "--save-probabilities") == 0
    for i in range(6):
        mask = np.asarray(Image.open(out / f"c{i}.png"))
        assert mask.dtype == np.uint8 and mask.shape == (28, 36) and set(np.unique(mask)) <= {0, 255}
        probabilities = np.load(out / f"c{i}.npz")["probabilities"]
        assert probabilities.shape == (2, 28, 36) and np.allclose(probabilities.sum(0), 1, atol=1e-5)
        assert np.array_equal(probabilities.argmax(0) * 255, mask)
    assert len(list((out / "overlays").iterdir())) == 6
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [LOCK]

    (out / "c0.png").unlink()
    (out / "c1.png").write_bytes(b"kept")
    assert run(*words) == 0 and (out / "c0.png").exists() and (out / "c1.png").read_bytes() == b"kept"
    assert "5 of 6 already predicted" in capsys.readouterr().out
    assert run(*words, "--overwrite") == 0 and (out / "c1.png").read_bytes() != b"kept"

    target = tmp_path / "summary.json"
    assert run("evaluate", data / "labels", out, "-o", target, "--no-progress") == 0
    summary = json.loads(target.read_text())
    assert summary["conventions"] == CONVENTIONS and len(summary["metric_per_case"]) == 6
    dice = [case["metrics"]["1"]["Dice"] for case in summary["metric_per_case"]]
    assert summary["foreground_mean"]["Dice"] == pytest.approx(np.mean(dice)) and np.mean(dice) > 0.7
    table = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [float(row["Dice"]) for row in table] == dice and table[0]["case"] == "c0.png"
    rejected(lambda: run("evaluate", data / "labels", out, "-o", target), target, "exists", "--overwrite")
    assert run("evaluate", data / "labels", out, "-o", target, "--no-progress", "--overwrite") == 0


def test_volumes_keep_their_geometry(deep, tmp_path):
    data, folder = deep
    source = data / "images/v0_0000.nii.gz"
    assert (
        run("predict", "-i", source, "-m", folder, "-o", tmp_path, "--no-progress", "--device", "cpu", "--overlay") == 0
    )
    image, mask = nibabel.load(source), nibabel.load(tmp_path / "v0.nii.gz")
    assert mask.shape == image.shape and mask.get_data_dtype() == np.uint8
    assert np.array_equal(mask.affine, AFFINE) and mask.header.get_zooms() == image.header.get_zooms()
    assert mask.header.get_xyzt_units() == image.header.get_xyzt_units()
    assert (
        mask.header["sform_code"] == image.header["sform_code"]
        and mask.header["qform_code"] == image.header["qform_code"]
    )
    assert set(np.unique(np.asanyarray(mask.dataobj))) <= {0, 1, 2}
    spec, _ = load_checkpoint(folder)
    assert spec.axis == 1 and spec.suffix and spec.patch == [32, 32]


@pytest.mark.parametrize("shape", [(28, 36), (28, 36, 1), (28, 1, 6)])
def test_thin_volumes(deep, tmp_path, shape):
    source = save_volume(tmp_path / "flat.nii.gz", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    words = ["--no-progress", "--device", "cpu", "--save-probabilities"]
    assert run("predict", "-i", source, "-m", deep[1], "-o", tmp_path / "out", *words) == 0
    assert nibabel.load(tmp_path / "out/flat.nii.gz").shape == nibabel.load(source).shape
    assert np.load(tmp_path / "out/flat.npz")["probabilities"].shape == (3, *shape)


def test_statistics_of_the_training_set_reach_prediction(tmp_path):
    data = volumes(tmp_path / "data", 3)
    settings = Settings(data=str(data), network=TINY, epochs=1, batch_size=8, normalisation="dataset")
    train(tmp_path / "run", settings, hardware=CPU)
    names = json.loads((tmp_path / "run/config.json").read_text())["split"]["train"]
    images = [np.asanyarray(nibabel.load(data / f"images/{name}_0000.nii.gz").dataobj) for name in names]
    values = np.concatenate([image[image != 0] for image in images]).astype(float)
    spec, _ = load_checkpoint(tmp_path / "run")
    assert spec.statistics is not None and np.allclose(spec.statistics, [[values.mean()], [values.std()]], rtol=1e-5)
    raw = np.moveaxis(images[0], 2, 0)[:, None].astype(np.float32)
    predictor = Predictor(tmp_path / "run", "cpu")
    seen = []
    predictor.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    predictor.probabilities(raw)
    inside = torch.cat(seen)[:, 0, 2:30, 14:50]
    expected = torch.from_numpy((raw[:, 0] - values.mean()) / values.std()).float()
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-4)


def test_one_volume_validates_on_a_block_apart(tmp_path):
    data = volumes(tmp_path / "data", 1, (28, 36, 20))
    train(tmp_path / "run", Settings(data=str(data), network=TINY, epochs=1, batch_size=8), hardware=CPU)
    split = json.loads((tmp_path / "run/config.json").read_text())["split"]
    assert split["val"] == [8, 9, 10, 11] and np.abs(np.subtract.outer(split["train"], split["val"])).min() == 4


class Stop(Callback):
    """Raises ``error`` in the second batch of epoch ``epoch``."""

    def __init__(self, epoch, error):
        self.epoch, self.error = epoch, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise self.error


def weights(path):
    """The network's tensors in a checkpoint, and its optimizer's."""
    stored = torch.load(path, weights_only=True)
    moments = stored["optimizer_states"][0]["state"]
    return stored["state_dict"] | {f"{i}.{k}": v for i, m in moments.items() for k, v in m.items()}


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt(), Interrupted), (MemoryError("full"), MemoryError)])
def test_an_interrupted_training_resumes_to_the_same_bits(tmp_path, error, seen):
    data = pictures(tmp_path / "data", 7)
    settings = Settings(data=str(data), network=TINY, epochs=4, batch_size=2, augmentation="standard")
    train(tmp_path / "whole", settings, hardware=CPU)
    with pytest.raises(seen):
        train(tmp_path / "cut", settings, hardware=CPU, callbacks=[Stop(2, error)])
    stopped = torch.load(tmp_path / "cut/last.ckpt", weights_only=True)
    assert stopped["epoch"] == 1
    (tmp_path / "cut").rename(tmp_path / "moved")
    torch.manual_seed(999)
    train(tmp_path / "moved", resumed(tmp_path / "moved", {}), hardware=CPU, resume=True)
    for name in ("last.ckpt", "best.ckpt"):
        one, two = weights(tmp_path / "whole" / name), weights(tmp_path / "moved" / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    rows = [list(csv.DictReader((tmp_path / r / "metrics.csv").open())) for r in ("whole", "moved")]
    for pair in zip(*rows, strict=True):
        assert {k: v for k, v in pair[0].items() if k != "seconds"} == {
            k: v for k, v in pair[1].items() if k != "seconds"
        }


def test_time_limit_shortens_the_plan(tmp_path):
    data = pictures(tmp_path / "data", 4)
    settings = Settings(data=str(data), network=TINY, epochs=500, batch_size=2, max_minutes=0.05)
    summary = train(tmp_path / "run", settings, hardware=CPU)
    assert summary["epochs"] < 500 and summary["seconds"] < 30 and (tmp_path / "run/last.ckpt").exists()


def test_a_run_is_not_replaced_unasked(flat, tmp_path):
    data, folder = flat
    words = ["train", "--data", data, *QUICK, "--epochs", 1]
    before = (folder / "best.ckpt").read_bytes()
    rejected(lambda: run(*words, "-o", folder), folder, "not empty", "--resume", "--overwrite")
    assert (folder / "best.ckpt").read_bytes() == before
    copied = shutil.copytree(folder, tmp_path / "run")
    (copied / "notes.txt").write_text("mine")
    assert run(*words, "-o", copied, "--overwrite") == 0
    assert json.loads((copied / "summary.json").read_text())["epochs"] == 1
    assert (copied / "notes.txt").read_text() == "mine"

    kept = (copied / "best.ckpt").read_bytes()
    broken = ["train", "--data", tmp_path / "none", "-o", copied, "--overwrite"]
    rejected(lambda: run(*broken), tmp_path / "none", "no such folder")
    rejected(lambda: run(*words, "-o", copied, "--overwrite", "--model", "vmunett"), "vmunett")
    assert (copied / "best.ckpt").read_bytes() == kept

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    rejected(lambda: run(*words, "-o", other, "--overwrite"), other, "not a run", "another folder")
    rejected(lambda: run(*words, "-o", other / "thesis.txt"), "thesis.txt", "is a file")


def test_what_cannot_be_resumed(flat, tmp_path):
    rejected(lambda: run("train", "-o", tmp_path, "--resume"), tmp_path, "no config.json")
    rejected(lambda: run("train", "-o", flat[1], "--resume", "--lr", 1), flat[1], "lr=0.005 (now 1.0)")
    copied = shutil.copytree(flat[1], tmp_path / "run")
    (copied / "last.ckpt").unlink()
    rejected(lambda: run("train", "-o", copied, "--resume"), copied, "no last.ckpt", "--overwrite")
    (copied / "config.json").write_text("{}")
    rejected(lambda: run("train", "-o", copied, "--resume"), copied / "config.json", "not a configuration")


def test_a_finished_run_resumes_to_itself(flat, tmp_path):
    copied = shutil.copytree(flat[1], tmp_path / "run")
    before = weights(copied / "last.ckpt")
    assert run("train", "-o", copied, "--resume", "--no-progress", "--accelerator", "cpu") == 0
    after = weights(copied / "last.ckpt")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((copied / "summary.json").read_text())["epochs"] == 20


def test_predict_refuses(flat, deep, tmp_path):
    data, folder = flat
    grey = tmp_path / "grey.png"
    Image.new("L", (40, 40)).save(grey)
    rejected(
        lambda: run("predict", "-i", grey, "-m", folder, "-o", tmp_path / "out"), grey, "1 channel(s)", "trained with 3"
    )
    here = data / "images"
    rejected(lambda: run("predict", "-i", here, "-m", folder, "-o", here), here / "c0.png", "another output folder")
    rejected(lambda: run("predict", "-i", here, "-m", folder, "-o", grey), grey, "is a file")
    rejected(lambda: run("predict", "-i", here, "-m", tmp_path / "none", "-o", tmp_path), "none", "no such checkpoint")
    rejected(
        lambda: run("predict", "-i", here, "-m", folder, "-o", tmp_path / "out", "--device", "tpu9"), "--device tpu9"
    )
    stored = torch.load(folder / "best.ckpt", weights_only=True)
    stored["state_dict"].popitem()
    torch.save(stored, tmp_path / "cut.ckpt")
    rejected(lambda: run("predict", "-i", here, "-m", tmp_path / "cut.ckpt", "-o", tmp_path), "cut.ckpt", "do not fit")


def test_evaluate_refuses(flat, tmp_path):
    labels = flat[0] / "labels"
    rejected(lambda: run("evaluate", tmp_path / "no", labels), tmp_path / "no", "no such folder")
    (tmp_path / "p").mkdir()
    rejected(lambda: run("evaluate", tmp_path / "p", labels), tmp_path / "p", "holds no masks")
    rejected(lambda: run("evaluate", labels, tmp_path / "p"), labels / "c0.png", "no prediction", "0 other file(s)")
    for path in labels.iterdir():
        Image.new("L", (9, 5)).save(tmp_path / "p" / path.name)
    rejected(
        lambda: run("evaluate", labels, tmp_path / "p", "--no-progress"), tmp_path / "p/c0.png", "5 x 9", "28 x 36"
    )


def test_the_embedded_mri():
    pytest.importorskip("nilearn")
    from vmamba.medical import mri

    image, label = mri.load_mri()
    classes = np.asanyarray(label.dataobj)
    assert image.shape == label.shape and np.array_equal(image.affine, label.affine)
    assert np.array_equal(np.unique(classes), [0, 1, 2]) and 1.3 < (classes == 1).sum() / (classes == 2).sum() < 2.2
    t1 = np.asanyarray(image.dataobj)
    assert t1[classes == 2].mean() > t1[classes == 1].mean() > t1[classes == 0].mean()
    blocks = mri.mri_split(classes)
    assert len(blocks["test"]) >= 20 and len(blocks["train"]) >= 60
    for one, two in (("train", "test"), ("train", "val"), ("val", "test")):
        assert np.abs(np.subtract.outer(blocks[one], blocks[two])).min() > mri.GAP


def test_an_exported_block_lies_where_it_was(tmp_path):
    pytest.importorskip("nilearn")
    from vmamba.medical import mri

    whole, _ = mri.load_mri()
    path, _ = mri.export_block(tmp_path, "part", [40, 41, 42])
    part = nibabel.load(path)
    assert np.array_equal(np.asanyarray(part.dataobj), np.asanyarray(whole.dataobj)[:, :, 40:43])
    assert np.allclose(part.affine @ [3, 4, 0, 1], whole.affine @ [3, 4, 40, 1])

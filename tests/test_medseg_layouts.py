"""vmamba medseg on the layouts of ISIC, Synapse and ACDC: lists, sizes, recipes, figures, and halves of layouts."""

import csv
import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import zoom

import vmamba
from tests.medseg_data import TINY, pictures
from tests.medseg_layouts import acdc, isic, synapse
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
pytest.importorskip("lightning")
pytest.importorskip("h5py")
import h5py

from vmamba.medical import arrays
from vmamba.medical.conventions import convention_of, pooled, volume_scores
from vmamba.medical.imagenet import load_start
from vmamba.medical.layouts import LAYOUTS, find_layout
from vmamba.medical.predict import Predictor
from vmamba.medical.prepare import prepare
from vmamba.medical.recipes import RECIPES, settings_for
from vmamba.medical.resize import RESIZERS, nearest
from vmamba.medical.spec import Settings
from vmamba.medical.transforms import normalise

MAKE = {"ISIC": isic, "Synapse": synapse, "ACDC": acdc}
SMALL = {
    "vmunet": [word for key, value in TINY.items() for word in ("--set", f"{key}={str(value).strip('[]')}")],
    "msvm_unet_tiny": ["--set", "dim=8", "--set", "depths=1,1,1,1", "--set", "depths_decoder=1,1,1"],
}
QUICK = ["--accelerator", "cpu", "--no-progress", "--size", 32, 32, "--batch-size", 2, "--epochs", 2]


pytestmark = pytest.mark.usefixtures("one_thread")


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(cases):
    return [case.name for case in cases]


def test_layouts_by_their_files(tmp_path):
    for name, make in MAKE.items():
        folder = make(tmp_path / name)
        layout = find_layout(folder)
        assert layout is LAYOUTS[name] and convention_of(folder) == name.lower()
        assert layout.recipe in RECIPES and settings_for({"data": str(folder)}).recipe == layout.recipe
    assert find_layout(pictures(tmp_path / "plain")) is None and convention_of(tmp_path / "plain") == "nnunet"
    assert find_layout(tmp_path / "none") is None and settings_for({"data": str(tmp_path / "plain")}) == Settings(
        data=str(tmp_path / "plain")
    )


def test_published_lists_are_the_parts(tmp_path):
    parts = LAYOUTS["Synapse"].parts(synapse(tmp_path / "s"))
    np.savez(tmp_path / "s/train_npz/case0099_slice000.npz", image=np.zeros((4, 4)), label=np.zeros((4, 4)))
    assert names(LAYOUTS["Synapse"].parts(tmp_path / "s")["train"]) == names(parts["train"])  # not in the list
    assert names(parts["test"]) == ["case0090", "case0091"] and len(parts["train"]) == 12
    parts = LAYOUTS["ACDC"].parts(acdc(tmp_path / "a"))
    assert names(parts["val"]) == ["case_003_sliceED_0", "case_003_sliceES_1"] and len(parts["train"]) == 8
    assert names(parts["test"]) == ["case_004_volume_ED", "case_004_volume_ES"]
    assert LAYOUTS["ACDC"].parts(acdc(tmp_path / "b", ending=""))["train"][0].name == parts["train"][0].name
    folder = isic(tmp_path / "i", {"train": 2, "val": 1, "test": 2}, "jpg")
    parts = LAYOUTS["ISIC"].parts(folder)
    assert {part: len(cases) for part, cases in parts.items()} == {"train": 2, "val": 1, "test": 2}
    assert names(LAYOUTS["ISIC"].tested(folder)) == ["test_0", "test_1"]
    shutil.rmtree(folder / "test")
    assert names(LAYOUTS["ISIC"].tested(folder)) == ["val_0"]


# layout, what is done to it -> what the line says
HALVES = {
    "ISIC without masks": ("ISIC", lambda f: shutil.rmtree(f / "train/masks"), ["train/masks", "half of ISIC's"]),
    "ISIC without val": ("ISIC", lambda f: shutil.rmtree(f / "val"), ["val/images", "half of ISIC"]),
    "a mask missing": ("ISIC", lambda f: (f / "train/masks/train_1.png").unlink(), ["train_1.png", "no mask"]),
    "an image missing": ("ISIC", lambda f: (f / "val/images/val_1.png").unlink(), ["val_1.png", "no image"]),
    "lists alone": ("Synapse", lambda f: shutil.rmtree(f / "train_npz"), ["train_npz", "lists_Synapse, test_vol"]),
    "no volumes": ("Synapse", lambda f: shutil.rmtree(f / "test_vol_h5"), ["test_vol_h5", "half of Synapse"]),
    "no lists": ("Synapse", lambda f: shutil.rmtree(f / "lists"), ["lists_Synapse", "(train_npz, test_vol_h5)"]),
    "no list": ("Synapse", lambda f: (f / "lists/lists_Synapse/train.txt").unlink(), ["train.txt", "one name a line"]),
    "empty list": ("ACDC", lambda f: (f / "lists_ACDC/valid.txt").write_text("\n"), ["valid.txt", "is empty"]),
    "no part": ("ACDC", lambda f: shutil.rmtree(f / "valid"), ["valid", "half of ACDC"]),
    "a slice missing": ("ACDC", lambda f: [p.unlink() for p in f.glob("train/case_002*")], ["002_sliceED_0", "3 more"]),
    "plain": ("ISIC", lambda f: [shutil.rmtree(f / p) for p in ("train", "val")], ["labels/", "ISIC, Synapse, ACDC"]),
}  # fmt: skip


@pytest.mark.parametrize("name", HALVES)
def test_half_a_layout(tmp_path, name):
    layout, spoil, parts = HALVES[name]
    folder = MAKE[layout](tmp_path / "d")
    spoil(folder)
    before = snapshot(tmp_path)
    rejected(lambda: run("train", "--data", folder, "-o", tmp_path / "run", *QUICK), *parts)
    assert snapshot(tmp_path) == before and not (tmp_path / "run").exists()


def rewrite(path, **arrays):
    with np.load(path) as file:
        np.savez(path, **{**dict(file), **arrays})


CASE = "train/case_001_sliceED_0.npz"
BROKEN = {
    "NaN": (lambda f: rewrite(f / CASE, img=np.full((37, 33), np.nan)), [CASE, "NaN"]),
    "class 7": (lambda f: rewrite(f / CASE, label=np.full((37, 33), 7)), [CASE, "values 7", "0, 1, 2, 3"]),
    "sizes": (lambda f: rewrite(f / CASE, label=np.zeros((5, 33))), [CASE, "5 x 33", "37 x 33"]),
    "no key": (lambda f: np.savez(f / CASE, x=np.zeros((37, 33))), [CASE, "holds x", "image or img"]),
    "4D": (lambda f: rewrite(f / CASE, img=np.zeros((2, 2, 37, 33))), [CASE, "(2, 2, 37, 33)", "(d, h, w)"]),
    "objects": (lambda f: rewrite(f / CASE, img=np.array([[{}]], object)), [CASE, "cannot be read", "pickle"]),
    "empty": (lambda f: (f / CASE).write_bytes(b""), [CASE, "0 bytes"]),
    "half": (lambda f: (f / CASE).write_bytes((f / CASE).read_bytes()[:999]), [CASE, "cannot be read"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_arrays(tmp_path, name):
    spoil, parts = BROKEN[name]
    folder = acdc(tmp_path / "d")
    spoil(folder)
    rejected(lambda: run("train", "--data", folder, "-o", tmp_path / "run", *QUICK), *parts)
    assert not (tmp_path / "run").exists()


def test_volumes_that_are_broken_and_h5py_missing(tmp_path, monkeypatch):
    path = synapse(tmp_path) / "test_vol_h5/case0090.npy.h5"
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "find_spec", lambda _: None)
        rejected(lambda: run("train", "--data", tmp_path, "-o", tmp_path / "run", *QUICK), path, "h5py", "pip install")
    path.write_bytes(path.read_bytes()[:500])
    rejected(lambda: run("train", "--data", tmp_path, "-o", tmp_path / "run", *QUICK), path, "cannot be read", "500")


def test_masks_of_isic(tmp_path):
    folder = isic(tmp_path / "d", {"train": 2, "val": 1})
    path = folder / "train/masks/train_0.png"
    read, mask = LAYOUTS["ISIC"].label, np.asarray(Image.open(path))
    assert np.array_equal(read(path)[0], mask // 255)
    Image.fromarray(np.where(mask > 0, 250, 3).astype(np.uint8)).save(path)  # as jpg makes of it
    assert np.array_equal(read(path)[0], mask // 255)
    Image.fromarray(mask // 255).save(path)
    rejected(lambda: read(path), path, "from 0 to 1", "0 and 255")
    Image.fromarray(0 * mask).save(path)
    assert not read(path).any()


def test_sizes_are_changed_as_the_papers_do(tmp_path):
    rng = np.random.default_rng(0)
    image, label = rng.random((2, 3, 30, 41), np.float32), rng.integers(0, 9, (2, 30, 41)).astype(np.uint8)
    cubic = RESIZERS["zoom"]
    wanted = zoom(image[1, 2], (24 / 30, 32 / 41), order=3)
    assert np.array_equal(cubic.image(image, (24, 32))[1, 2], wanted)
    for size in ((24, 32), (64, 50), (30, 41)):
        flat = zoom(label[1], (size[0] / 30, size[1] / 41), order=0)
        assert np.array_equal(cubic.label(label, size)[1], flat) and flat.shape == size
    mask = (label > 4).astype(np.uint8)
    halved = RESIZERS["bilinear"].label(mask, (15, 41))
    assert halved.shape == (2, 15, 41) and np.array_equal(halved, (mask[:, ::2] + mask[:, 1::2]) > 0)
    small = rng.integers(0, 2, (1, 32, 32))
    assert np.array_equal(nearest(nearest(small, (45, 77)), (32, 32)), small)  # scored as it was predicted


def test_intensities():
    x = np.random.default_rng(0).random((2, 3, 5, 7), np.float32)
    assert np.array_equal(normalise(x, "centred"), 2 * x - 1)
    y = normalise(7 * x - 3, "range255")
    np.testing.assert_allclose(y[1], 255 * (x[1] - x[1].min()) / (x[1].max() - x[1].min()), rtol=1e-4, atol=1e-3)


def train(folder, out, network, *more):
    return run("train", "--data", folder, "-o", out, *QUICK, *SMALL[network], *more)


def predicted(data, model, out, *more):
    return run("predict", "-i", data, "-m", model, "-o", out, "--no-progress", "--device", "cpu", *more)


def evaluated(truth, masks, target, *more):
    assert run("evaluate", truth, masks, "-o", target, "--no-progress", *more) == 0
    return json.loads(target.read_text()), list(csv.DictReader(target.with_suffix(".csv").open()))


def test_isic_from_pictures_to_the_papers_figures(tmp_path, capsys):
    folder, out = isic(tmp_path / "d", {"train": 6, "val": 2}, "jpg"), tmp_path / "run"
    assert train(folder, out, "vmunet", "--lr", 5e-3, "--epochs", 6) == 0
    text = capsys.readouterr().out
    assert "layout of ISIC; 6 slice(s) to train and 2 to validate" in text and "recipe vmunet-isic" in text
    config, summary = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert (
        config["split"]["val"] == ["val_0", "val_1"]
        and config["spec"]["sigmoid"]
        and summary["best_by"] == "min val_loss"
    )
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    losses = [float(row["val_loss"]) for row in rows]
    assert losses.index(min(losses)) + 1 == summary["best_epoch"] and float(rows[1]["lr"]) > 4.9e-3
    assert Predictor(out, "cpu").network.outputs[-1].out_channels == 1
    assert predicted(folder, out, tmp_path / "p", "--save-probabilities") == 0
    mask, truth = (
        np.asarray(Image.open(p)) for p in (tmp_path / "p/val_1.png", folder / "val/masks/val_1_segmentation.png")
    )
    assert mask.shape == truth.shape == (31, 44) and set(np.unique(mask)) <= {0, 255}
    assert np.array_equal(np.load(tmp_path / "p/val_1.npz")["probabilities"][1] > 0.5, mask > 0)
    capsys.readouterr()
    figures, table = evaluated(folder, tmp_path / "p", tmp_path / "s.json")
    assert figures["convention"] == "isic" and "256 x 256" in figures["conventions"]
    assert "mIoU" in (text := capsys.readouterr().out) and "convention isic" in text
    truths = [LAYOUTS["ISIC"].label(folder / f"val/masks/val_{i}_segmentation.png") for i in range(2)]
    masks = [np.asarray(Image.open(tmp_path / f"p/val_{i}.png"))[None] for i in range(2)]
    resized = (
        [RESIZERS["bilinear"].label(t, (256, 256)) > 0 for t in truths],
        [nearest(m, (256, 256)) > 0 for m in masks],
    )
    assert figures["pooled"] == pooled(list(zip(*resized, strict=True))) and len(table) == 2
    assert int(table[0]["TP"]) == np.count_nonzero(resized[0][0] & resized[1][0])
    own, _ = evaluated(folder, tmp_path / "p", tmp_path / "n.json", "--convention", "nnunet")
    assert own["convention"] == "nnunet" and own["metric_per_case"][0]["metrics"]["1"]["n_ref"] == truths[0].sum()


def test_synapse_from_slices_to_the_papers_figures(tmp_path, capsys):
    folder, out = synapse(tmp_path / "d"), tmp_path / "run"
    assert train(folder, out, "vmunet") == 0
    assert "12 slice(s) to train and 6 to validate; there is no list" in capsys.readouterr().out
    config, summary = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert len(config["split"]["train"]) == 12 and summary["best_by"] == "min train_loss"
    assert config["spec"]["channels"] == 1 and Predictor(out, "cpu").network.in_chans == 3
    assert predicted(folder, out, tmp_path / "p", "--save-probabilities", "--overlay") == 0
    assert (tmp_path / "p/overlays/case0090.png").exists()
    image = nibabel.load(tmp_path / "p/case0090.nii.gz")
    assert (
        image.shape == (40, 40, 3)
        and image.get_data_dtype() == np.uint8
        and nibabel.aff2axcodes(image.affine) == ("P", "L", "S")
    )
    with h5py.File(folder / "test_vol_h5/case0090.npy.h5") as file:
        raw, truth = file["image"][:], file["label"][:]
    mask = np.moveaxis(np.asanyarray(image.dataobj), 2, 0)  # (d, h, w)
    predictor = Predictor(out, "cpu")
    with torch.no_grad():
        small = zoom(raw[1], (32 / 40, 32 / 40), order=3)
        classes = predictor.network(torch.from_numpy(small)[None, None]).argmax(1)[0].numpy()
    assert np.array_equal(mask[1], np.asarray(zoom(classes, (40 / 32, 40 / 32), order=0)))
    figures, table = evaluated(folder, tmp_path / "p", tmp_path / "s.json")
    assert figures["convention"] == "synapse" and figures["names"]["6"] == "pancreas" and len(table) == 2 * 8
    assert figures["metric_per_case"][0]["metrics"]["6"] == volume_scores(truth == 6, mask == 6)
    assert "pancreas" in capsys.readouterr().out
    again, _ = evaluated(folder / "test_vol_h5", tmp_path / "p", tmp_path / "t.json", "--convention", "synapse")
    assert again["mean"]["1"] == figures["mean"]["1"]
    first = (tmp_path / "p/case0091.nii.gz").read_bytes()
    assert predicted(folder / "test_vol_h5/case0091.npy.h5", out, tmp_path / "q") == 0
    assert (tmp_path / "q/case0091.nii.gz").read_bytes() == first


def test_acdc_with_msvm_unet(tmp_path, capsys):
    folder, out = acdc(tmp_path / "d"), tmp_path / "run"
    assert train(folder, out, "msvm_unet_tiny") == 0
    assert "8 slice(s) to train and 2 to validate; published lists" in capsys.readouterr().out
    assert predicted(folder, out, tmp_path / "p") == 0
    figures, _ = evaluated(folder, tmp_path / "p", tmp_path / "s.json")
    assert figures["convention"] == "acdc" and list(figures["names"].values())[1] == "myocardium"
    perfect = tmp_path / "perfect"
    perfect.mkdir()
    for name in ("ED", "ES"):
        label = np.load(folder / f"test/case_004_volume_{name}.npz")["label"]
        nibabel.save(
            nibabel.Nifti1Image(np.moveaxis(label, 0, 2), arrays.AFFINE), perfect / f"case_004_volume_{name}.nii.gz"
        )
    figures, _ = evaluated(folder, perfect, tmp_path / "t.json")
    assert figures["foreground_mean"] == {"Dice": 1, "HD95": 0}
    assert train(folder, out, "msvm_unet_tiny", "--resume") == 0  # finished already: nothing to do


def test_scans_held_out_and_test_volumes_that_must_not_choose(tmp_path):
    folder = synapse(tmp_path / "d", scans=4)
    given = {"data": str(folder), "size": [32, 32]}
    prepared = prepare(settings_for({**given, "val_fraction": 0.25}))
    train, val = prepared.split["train"], prepared.split["val"]
    assert len(train) == 12 and len(val) == 4 and not {n[:8] for n in train} & {n[:8] for n in val}
    assert len(prepare(settings_for(given)).split["train"]) == 16
    rejected(lambda: prepare(settings_for({**given, "recipe": "plain", "val_fraction": 0.0})), "must not choose", "0.2")
    rejected(lambda: prepare(settings_for({**given, "recipe": "vmunet-isic"})), "two classes", "have 9")
    plain = pictures(tmp_path / "plain", 3)
    rejected(lambda: prepare(Settings(data=str(plain), val_fraction=0.0)), "--val-fraction 0", "layouts")
    rejected(
        lambda: run("train", "--data", folder, "--recipe", "vm", "-o", tmp_path / "r"), "--recipe vm", "msvm-synapse"
    )


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    folder = synapse(tmp_path / "d")
    before = snapshot(tmp_path)
    assert run("train", "--data", folder, "--dry-run", *QUICK, *SMALL["vmunet"]) == 0
    text = capsys.readouterr().out
    for words in (
        "recipe vmunet-synapse",
        "CE + Dice",
        "2 epochs of 6 step(s)",
        "4 stages",
        "GiB",
        "patches of 32 x 32",
    ):
        assert words in text, text
    assert snapshot(tmp_path) == before


def test_a_start_from_imagenet(tmp_path):
    torch.manual_seed(0)
    encoder = vmamba.create_model("vanilla_vmamba_tiny", depths=(1, 1, 1, 1), dim=8, num_classes=5)
    torch.save({"model": encoder.state_dict()}, tmp_path / "classifier.pth")
    network = vmamba.create_model("vmunet", num_classes=1, in_chans=3, **TINY)
    report = load_start(network, tmp_path / "classifier.pth")
    assert len(report.loaded) > 60 and not [name for name in report.missing if name.startswith("encoder.")]
    torch.testing.assert_close(network.stem.conv1.weight, encoder.stem.conv1.weight, rtol=0, atol=0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save({"model": {"head.weight": torch.ones(3)}}, tmp_path / "other.pth")
    rejected(lambda: load_start(network, tmp_path / "other.pth"), "other.pth", "nor a classifier")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    words = [*QUICK[:-1], 1, *SMALL["vmunet"], "--pretrained", tmp_path / "classifier.pth"]
    assert run("train", "--data", isic(tmp_path / "d"), "-o", tmp_path / "run", *words) == 0

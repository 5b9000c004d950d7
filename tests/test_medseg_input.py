"""Bad input of medseg: one line that names the file, what was found and what would do; exit code 2."""

import argparse
import shutil
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tests.medseg_data import AFFINE, pictures, save_volume, volumes

pytest.importorskip("monai")
import torch

from vmamba.errors import UserError
from vmamba.medical.cases import Case, input_cases, pair_cases
from vmamba.medical.labels import label_values
from vmamba.medical.prepare import prepare
from vmamba.medical.readers import read_image, read_label
from vmamba.medical.runs import load_checkpoint
from vmamba.medical.spec import Settings
from vmamba.medical.splits import split_cases, split_slices
from vmamba.tools import medseg
from vmamba.tools.cli import main


def run(*words):
    """What ``vmamba medseg ...`` does, errors raised."""
    parser = argparse.ArgumentParser()
    medseg.add_parser(parser.add_subparsers())
    args = parser.parse_args(["medseg", *map(str, words)])
    return args.run(args)


def rejected(action, *parts):
    """The error's line, after checking that it is one and holds ``parts``."""
    with pytest.raises(UserError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert str(part) in line, line
    return line


@pytest.fixture
def data(tmp_path):
    return pictures(tmp_path / "data", 3)


def settings(data, **options):
    return Settings(data=str(data), preset="small", **options)


def test_pairs_by_name_and_by_channel(tmp_path, data):
    assert [c.name for c in pair_cases(data)] == ["c0", "c1", "c2"]
    cases = pair_cases(volumes(tmp_path / "v"))
    assert [c.name for c in cases] == ["v0", "v1"] and cases[0].images[0].name == "v0_0000.nii.gz"
    for i in range(2):
        shutil.copy(tmp_path / f"v/images/v{i}_0000.nii.gz", tmp_path / f"v/images/v{i}_0001.nii.gz")
    cases = pair_cases(tmp_path / "v")
    assert [len(c.images) for c in cases] == [2, 2] and read_image(cases[0].images, 2).shape == (6, 2, 28, 36)
    again = input_cases([tmp_path / "v/images"], 2, True)
    assert [c.name for c in again] == ["v0", "v1"]
    (tmp_path / "v/images/v1_0001.nii.gz").unlink()
    rejected(lambda: pair_cases(tmp_path / "v"), "v1_0000.nii.gz", "1 channel file(s)", "has 2")
    rejected(lambda: input_cases([tmp_path / "v/images"], 2, True), "v1", "1 file(s)", "2 per case")


def test_frames_numbered_like_channels_stay_apart(tmp_path):
    for sub in ("images", "labels"):
        (tmp_path / sub).mkdir()
        for i in range(3):
            (tmp_path / sub / f"frame_000{i}.png").touch()
    assert [c.name for c in pair_cases(tmp_path)] == ["frame_0000", "frame_0001", "frame_0002"]
    assert len(input_cases([tmp_path / "images"], 1, False)) == 3


def test_missing_folder(tmp_path):
    rejected(lambda: pair_cases(tmp_path / "none"), tmp_path / "none", "no such folder", "images/ and labels/")
    (tmp_path / "images").mkdir()
    rejected(lambda: pair_cases(tmp_path), tmp_path / "labels", "no such folder")


def test_no_pairs(data):
    for path in (data / "labels").iterdir():
        path.rename(path.with_name("x" + path.name))
    rejected(lambda: pair_cases(data), data, "3 file(s) in images/", "expected images/NAME.png")


def test_image_or_label_alone(data):
    (data / "labels/c1.png").unlink()
    rejected(lambda: pair_cases(data), data / "images/c1.png", "without label")
    (data / "images/c1.png").unlink()
    (data / "images/c2.png").unlink()
    rejected(lambda: pair_cases(data), data / "labels/c2.png", "without image")


def test_one_name_twice(data):
    shutil.copy(data / "images/c1.png", data / "images/c1.bmp")
    rejected(lambda: pair_cases(data), "c1.png", "c1.bmp")


def test_size_and_spacing_mismatch(tmp_path, data):
    Image.new("L", (5, 9)).save(data / "labels/c1.png")
    rejected(lambda: prepare(settings(data)), data / "labels/c1.png", "9 x 5", "28 x 36")
    folder = volumes(tmp_path / "v")
    save_volume(folder / "labels/v1.nii.gz", read_label(folder / "labels/v1.nii.gz", 0).astype(np.uint8), AFFINE * 2)
    rejected(lambda: prepare(settings(folder)), "v1.nii.gz", "spacing 4 x 3 x 6 mm", "2 x 1.5 x 3 mm", "resample")


@pytest.mark.parametrize("kind", ["png", "nii.gz", "nii", "tif"])
def test_truncated_and_foreign_files(tmp_path, kind):
    path = tmp_path / f"broken.{kind}"
    if "nii" in kind:
        save_volume(path, np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16))
    else:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60)).astype(np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    rejected(lambda: read_image([path], 2), path, "cannot be read", f"{len(whole) // 2} bytes")
    path.write_bytes(b"hello")
    rejected(lambda: read_image([path], 2), path, "cannot be read", "5 bytes")
    path.write_bytes(b"")
    rejected(lambda: read_label(path, 2), path, "0 bytes")


def test_channels_must_agree(data):
    Image.open(data / "images/c2.png").convert("L").save(data / "images/c2.png")
    rejected(lambda: prepare(settings(data)), data / "images/c2.png", "1 channel(s)", "c0.png has 3")


def test_colour_label(data):
    shutil.copy(data / "images/c0.png", data / "labels/c0.png")
    rejected(lambda: prepare(settings(data)), data / "labels/c0.png", "3 channels", "one channel")


def test_label_values(tmp_path, data):
    path = save_volume(tmp_path / "a.nii.gz", np.full((4, 4, 4), 1.5, np.float32))
    rejected(lambda: read_label(path, 2), path, "1.5", "not a whole number")
    rejected(lambda: label_values({"a": np.array([0, 1]), "b": np.array([0, 3])}), "b", "0, 1, 3", "class 2 is missing")
    rejected(lambda: label_values({"a": np.array([-1, 0, 1])}), "a", "-1")
    rejected(lambda: label_values({"a": np.array([0])}), "a", "0 only", "two classes")
    rejected(lambda: label_values({"grey": np.arange(0, 200, 3)}), "grey", "67 values", "consecutive")
    assert label_values({"a": np.array([0, 255]), "b": np.array([0])}) == [0, 255]
    assert label_values({"a": np.array([0, 2]), "b": np.array([0, 1])}) == [0, 1, 2]


def test_nan_in_image_and_label(tmp_path):
    bad = np.zeros((4, 5, 6), np.float32)
    bad[1, 2, 3] = np.nan
    path = save_volume(tmp_path / "a.nii.gz", bad)
    rejected(lambda: read_image([path], 2), path, "1 of 120", "NaN")
    rejected(lambda: read_label(path, 2), path, "1 of 120", "NaN")


def test_pages_and_dimensions(tmp_path):
    frames = [Image.new("L", (8, 8)) for _ in range(3)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    rejected(lambda: read_image([tmp_path / "a.tif"], 2), "a.tif", "3 pages", "NIfTI")
    path = save_volume(tmp_path / "a.nii.gz", np.zeros((3, 4, 5, 2, 2), np.float32))
    rejected(lambda: read_image([path], 2), path, "(3, 4, 5, 2, 2)", "(x, y, z)")


def test_kinds_of_pictures(tmp_path):
    values = np.arange(60, dtype=np.uint8).reshape(6, 10)
    shapes = {"L": 1, "RGB": 3, "RGBA": 3, "P": 3, "I;16": 1, "1": 1}
    for mode, channels in shapes.items():
        picture = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else Image.fromarray(values).convert(mode)
        picture.save(tmp_path / "a.png")
        assert read_image([tmp_path / "a.png"], 2).shape == (1, channels, 6, 10), mode
    indexed = Image.fromarray(values % 3).copy()
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [0] * 759)
    indexed.save(tmp_path / "palette.png")
    assert np.array_equal(read_label(tmp_path / "palette.png", 2)[0], values % 3)


def test_predict_input(tmp_path, data):
    rejected(lambda: input_cases([tmp_path / "no.png"], 1, False), tmp_path / "no.png", "no such file")
    (tmp_path / "a.txt").touch()
    rejected(lambda: input_cases([tmp_path / "a.txt"], 1, False), "a.txt", "not an image", ".nii.gz")
    (tmp_path / "empty").mkdir()
    rejected(lambda: input_cases([tmp_path / "empty"], 1, False), "empty", "no image")
    assert input_cases([data / "images/c0.png"], 1, True) == [Case("c0", (data / "images/c0.png",))]


def test_foreign_checkpoints(tmp_path):
    rejected(lambda: load_checkpoint(tmp_path / "x.ckpt"), "x.ckpt", "no such checkpoint")
    rejected(lambda: load_checkpoint(tmp_path), "best.ckpt", "no such checkpoint")
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"no checkpoint")
    rejected(lambda: load_checkpoint(path), path, "cannot be read")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    rejected(lambda: load_checkpoint(path), path, "not one of vmamba medseg train")
    torch.save({"hyper_parameters": {"spec": {"format": "other"}}}, path)
    rejected(lambda: load_checkpoint(path), path, "'other'")
    torch.save({"settings": Fraction(1, 2)}, path)
    rejected(lambda: load_checkpoint(path), path, "cannot be read")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--epochs", "0"], ["--epochs 0", "at least 1"]),
        (["--lr", "-1"], ["--lr -1", "above 0"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--val-fraction", "1.5"], ["--val-fraction 1.5"]),
        (["--patch", "50"], ["--patch 50", "multiples of 32", "64 64"]),
        (["--patch", "32", "32", "32"], ["--patch"]),
        (["--preset", "huge"], ["--preset huge", "published, small"]),
        (["--normalisation", "ct"], ["--normalisation ct", "zscore"]),
        (["--augmentation", "wild"], ["--augmentation wild", "mirror"]),
        (["--precision", "8"], ["--precision 8", "bf16-mixed"]),
        (["--set", "dims"], ["--set dims", "KEY=VALUE"]),
        (["--set", "dims=8,16,32,63"], ["vmunet", "dims must double"]),
        (["--set", "width=8"], ["vmunet", "width"]),
        (["--model", "vmunett"], ["vmunett"]),
        (["--devices", "0"], ["--devices 0"]),
    ],
)
def test_options_that_cannot_work(data, tmp_path, words, parts):
    rejected(lambda: run("train", "--data", data, "-o", tmp_path / "run", "--no-progress", *words), *parts)


def test_exit_code_and_the_one_line(data, tmp_path, capsys):
    assert main(["medseg", "train", "--data", str(tmp_path / "none"), "-o", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vmamba: error: ") and err.count("\n") == 1 and str(tmp_path / "none") in err and not out
    assert not (tmp_path / "run").exists()


def test_a_network_that_does_not_segment(data, tmp_path):
    words = ["--model", "vmamba_tiny_s1l8", "--epochs", 1, "--batch-size", 2, "--accelerator", "cpu", "--no-progress"]
    rejected(
        lambda: run("train", "--data", data, "-o", tmp_path / "run", *words), "vmamba_tiny_s1l8", "(2, 2)", "vmunet"
    )


def test_one_picture_is_too_few(data):
    for name in ("c1.png", "c2.png"):
        (data / "images" / name).unlink()
        (data / "labels" / name).unlink()
    rejected(lambda: prepare(settings(data)), data, "c0", "at least two")


def test_splits():
    train, val = split_cases([f"c{i}" for i in range(10)], 0.2, 3)
    assert sorted(train + val) == [f"c{i}" for i in range(10)] and len(val) == 2
    assert (train, val) == split_cases([f"c{i}" for i in range(10)], 0.2, 3)
    assert len(split_cases(["a", "b"], 0.01, 0)[1]) == len(split_cases(["a", "b"], 0.99, 0)[0]) == 1
    blocks = split_slices(np.arange(100, 200), {"test": (0.4, 0.5), "val": (0.7, 0.8)}, 5)
    assert blocks["test"].tolist() == list(range(140, 150)) and blocks["val"].tolist() == list(range(170, 180))
    for name in ("test", "val"):
        assert np.abs(blocks["train"][:, None] - blocks[name]).min() == 6
    assert len(blocks["train"]) == 60
    rejected(lambda: split_slices(np.arange(4), {"val": (0.4, 0.6)}, 3), "4 slices are too few")

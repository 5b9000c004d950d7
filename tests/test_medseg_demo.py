"""The program behind make demo, cut short: what it writes and where the prediction lies."""

import json
import re

import nibabel
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("monai")
pytest.importorskip("nilearn")
from vmamba.medical.plots import choose_slices, save_overlay
from vmamba.tools import demo


def test_demo_writes_its_files(tmp_path, monkeypatch, capsys):
    words = ["demo", "-o", str(tmp_path / "demo"), "--epochs", "1", "--minutes", "0.02"]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", words)
        assert demo.main() == 0
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert re.fullmatch(r"mean Dice 0\.\d\d", last)
    source = nibabel.load(tmp_path / "demo/run/test/images/mni152.nii.gz")
    prediction = nibabel.load(tmp_path / "demo/prediction.nii.gz")
    assert prediction.shape == source.shape and np.array_equal(prediction.affine, source.affine)
    assert prediction.header.get_zooms() == source.header.get_zooms() and prediction.get_data_dtype() == np.uint8
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert {"foreground_mean", "mean", "conventions", "training", "settings"} <= set(summary)
    for name in ("overlay.png", "curves.png"):
        assert min(Image.open(tmp_path / "demo" / name).size) > 300


def test_overlay_colours_the_classes(tmp_path):
    image = np.full((2, 1, 40, 60), 100.0)
    image[:, :, :20] = 0
    mask = np.zeros((2, 40, 60), int)
    mask[1, 5:35, 5:55] = 1
    assert choose_slices(mask) == [1] and choose_slices(0 * mask) == [0, 1]
    save_overlay(tmp_path / "a.png", image, {"truth": mask, "other": 0 * mask}, ["background", "lesion"])
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    coloured = (pixels.max(-1) - pixels.min(-1) > 60).mean(axis=0)
    third = len(coloured) // 3
    assert coloured[third : 2 * third].mean() > 0.3 > 0.1 > coloured[-third:].mean() and coloured[:third].mean() < 0.1

"""vmamba medseg benchmark and compare, and what prediction does to be fast: the same logits, wherever they are made."""

import json
import re
import shlex
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.medseg_nnunet import SMALL, dataset
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
pytest.importorskip("lightning")
import vmamba
from vmamba.errors import UserError
from vmamba.medical import compare as comparing
from vmamba.medical import window as windows
from vmamba.medical.benchmark import CT, PUBLISHED, Example, Setup, build, plain_unet, setups, supervise
from vmamba.medical.benchmark_predict import count
from vmamba.medical.benchmark_train import training_step
from vmamba.medical.compare import Comparison, Entry, compare
from vmamba.medical.fold_predict import _prepared
from vmamba.medical.model_folder import Trained
from vmamba.medical.raw import read_dataset
from vmamba.medical.resample import resample, resample_maps
from vmamba.medical.train import LOADERS, Hardware
from vmamba.medical.window import Window, volume_logits
from vmamba.registry import entries
from vmamba.tools.cli import main, parser

QUIET = "--no-progress"
TEXT = (Path(__file__).parent.parent / "docs/medical.md").read_text(encoding="utf-8")
TINY = Setup((16, 16), 2, 1, 3, "")


def test_every_published_setup_is_of_a_network():
    for name, setup in PUBLISHED.items():
        entry = entries()[name]
        assert entry.settings.get("axes", len(entry.settings.get("strides", ((0,) * len(setup.patch),))[0])) == len(
            setup.patch
        )
    found = setups(["vmunet", "umamba_bot_3d"], None, 4)
    assert found["vmunet"].batch == 4 and found["umamba_bot_3d"].patch == CT.patch
    rejected(lambda: setups(["vmamba_tiny_s1l8"], None, None), "vmamba_tiny_s1l8", "umamba_bot_3d")
    rejected(lambda: setups(["vmunet"], [32, 32, 32], None), "vmunet needs 2 sides")


def test_nnunets_network_has_umambas_topology():
    """The stand-in as well: U-Mamba was published with nnU-Net's plan for AbdomenCT."""
    settings = entries()["umamba_bot_3d"].settings
    network = plain_unet(CT)
    sizes = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3)]
    assert set(settings["features"][1:]) <= set(sizes) and max(sizes) == settings["features"][-1]
    strides = sorted(m.stride for m in network.modules() if isinstance(m, nn.ConvTranspose3d))
    assert strides == sorted(settings["strides"][1:])


@pytest.mark.parametrize("what", ["train", "feed", "predict"])
def test_benchmark(what, tmp_path, monkeypatch, capsys):
    module = import_module(f"vmamba.medical.benchmark_{what}")
    monkeypatch.setattr(module, "build", lambda name, setup: nn.Conv2d(setup.channels, setup.classes, 3, padding=1))
    words = ["benchmark", what, "vmunet", "--patch", 32, 32, "--batch", 1, "--workers", 0, "--repeat", 1]
    path = tmp_path / "rows.json"
    assert run(*words, "--volume", 2, 40, 32, "--device", "cpu", "--json", path, QUIET) == 0
    found, text = json.loads(path.read_text()), capsys.readouterr().out
    rows = {row["name"].split()[0]: row for row in found["rows"]}
    assert all(row["failure"] is None for row in rows.values()) and found["kind"] == f"medseg {what}"
    assert "torch" in found["machine"]["versions"] and "32-true" in text and "| vmunet" in text
    row = rows["vmunet"]
    if what == "train":
        assert row["ms"] > 0 and row["steps"] == 1 and len(rows) == 2
    elif what == "feed":
        assert row["with_per_s"] > 0 < row["loading_per_s"] and row["busy"] is None
    else:
        assert row["whole_s"] > 0 < row["windows_s"] and row["windows"] == 4 and len(found["rows"]) == 4
        assert {row["mirrors"] for row in found["rows"]} == {4, 1}


def test_benchmark_refuses(tmp_path):
    rejected(lambda: run("benchmark", "train", "vmunt"), "vmunt", "vmunet")
    rejected(lambda: run("benchmark", "train", "vmunet", "--precision", "half"), "half", "bf16-mixed")
    rejected(lambda: run("benchmark", "feed", "vmunet", "--precision", "16-mixed"), "16-mixed", "scaled")
    rejected(lambda: run("benchmark", "predict", "vmunet", "--volume", 0, 3, 3), "--volume")
    rejected(lambda: run("benchmark", "predict", "vmunet", "--windows", 0), "--windows 0")
    rejected(lambda: run("benchmark", "predict", "vmunet", "--json", tmp_path / "no/a.json"), "no folder")


def test_a_failing_network_is_a_row(tmp_path, monkeypatch, capsys):
    from vmamba.medical import benchmark_predict

    def fails(name, setup):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(benchmark_predict, "build", fails)
    path = tmp_path / "rows.json"
    assert run("benchmark", "predict", "vmunet", "--no-baseline", "--device", "cpu", "--json", path, QUIET) == 0
    failures = [row["failure"] for row in json.loads(path.read_text())["rows"]]
    assert failures == ["RuntimeError: no such luck"] * 2 and "no such luck" in capsys.readouterr().out


@pytest.mark.parametrize(("volume", "patch", "expected"), [((10, 40, 32), (32, 32), 20), ((9, 9, 9), (9, 9, 9), 1)])
def test_windows_are_counted_as_they_are_seen(volume, patch, expected):
    seen = []
    network = nn.Identity()
    network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    volume_logits([Trained(network, patch, (0,))], torch.randn(1, *volume), Window())
    assert count(volume, patch, 0.5) == expected and sum(seen) == 2 * expected


def test_memory_that_does_not_suffice(monkeypatch):
    """Fewer windows at once, then their sum in main memory: the same logits."""
    network = nn.Conv3d(1, 2, 3, padding=1).eval()
    model, x = Trained(network, (8, 8, 8), (0, 1, 2)), torch.randn(1, 12, 11, 13)
    expected, tried, cover = volume_logits([model], x, Window()), [], windows._cover

    def short(run, model, batch, window, together, device):
        tried.append(together)
        if len(tried) < 3:
            raise torch.OutOfMemoryError
        return cover(run, model, batch, window, together, device)

    monkeypatch.setattr(windows, "_cover", short)
    torch.testing.assert_close(volume_logits([model], x, Window(batch=8)), expected)
    assert tried == [8, 2, 1]


def test_precision():
    network = nn.Conv2d(1, 2, 3).eval()
    model, x = Trained(network, (8, 8), ()), torch.randn(1, 2, 8, 8)
    padded = Trained(nn.Sequential(nn.ZeroPad2d(1), network), model.patch, ())
    whole, half = (volume_logits([padded], x, Window(precision=p)) for p in ("32-true", "bf16-mixed"))
    assert half.dtype == torch.float32 and 0 < (whole - half).abs().max() < 0.1
    assert Window().precision == "32-true"
    rejected(lambda: Window(precision="double"), "--precision double", "bf16-mixed")


@pytest.mark.parametrize("coarse", [None, 0, 1, 2])
@pytest.mark.parametrize("shape", [(14, 18, 22), (5, 13, 30), (7, 9, 30)])
def test_resampling_where_the_maps_lie(coarse, shape):
    maps = np.random.default_rng(0).standard_normal((3, 7, 9, 11)).astype(np.float32)
    expected = resample(maps, shape, coarse, 1)
    assert np.allclose(resample_maps(torch.from_numpy(maps), shape, coarse).numpy(), expected, atol=1e-5)


def test_a_case_is_read_while_the_one_before_is_predicted(tmp_path, monkeypatch):
    from vmamba.medical import fold_predict

    begun = []

    def read(files, channels):
        begun.append(files)
        if files == "bad":
            raise UserError("bad: broken")
        return files

    monkeypatch.setattr(fold_predict, "read_volume", read)
    monkeypatch.setattr(fold_predict, "preprocess_case", lambda image, *rest: (image, None, None))
    model = type("Model", (), {"channels": 1, "plans": {}, "configuration": None})()
    cases = _prepared(model, ["a", "b", "bad"])  # pyright: ignore[reportArgumentType]
    assert next(cases)[0] == "a" and begun[0] == "a"
    assert next(cases)[0] == "b"
    rejected(lambda: next(cases), "bad: broken")
    assert begun == ["a", "b", "bad"] and list(_prepared(model, [])) == []  # pyright: ignore[reportArgumentType]


def test_loaders(monkeypatch):
    assert Hardware("cpu").loaders == 0 and Hardware("cpu", workers=3).loaders == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert 1 <= Hardware().loaders <= LOADERS and Hardware("cpu").loaders == 0 and Hardware(workers=0).loaders == 0


def in_process(words, log, end=None):
    """What ``compare.run`` does, without the seconds that a process takes to start."""
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        if main(["medseg", *map(str, words), QUIET]):
            raise subprocess.CalledProcessError(2, "vmamba")
    return 1.0


def test_compare(tmp_path, monkeypatch):
    """Two folds of a network, and one that does not exist: its row tells why, the other goes on."""
    found = read_dataset(dataset(tmp_path))
    assert run("plan", "-d", 7, "--root", tmp_path, QUIET) == 0
    assert run("preprocess", "-d", 7, "-c", "2d", "--root", tmp_path, QUIET) == 0
    (tmp_path / "out").mkdir()
    options = "--epochs 1 --iterations 2 --val-iterations 1 --batch-size 2 --lr 2e-3 --optimizer adamw --disable_tta"
    comparison = Comparison(tmp_path, found, ("0", "1"), tmp_path / "out", "cpu")
    there, absent = (Entry(n, "2d", (*options.split(), *SMALL)) for n in ("vmunet", "vmunett"))
    monkeypatch.setattr(comparing, "run", in_process)
    rows = compare(comparison, [absent, there], 1)
    assert [row["name"] for row in rows] == ["vmunett_2d", "vmunet_2d"] and "no such network" in rows[0]["failure"]
    assert rows[1]["failure"] is None and set(rows[1]["crossval"]) == set(rows[1]["test"]) == {"1", "2"}
    assert json.loads((tmp_path / "out/compare.json").read_text())["rows"][1]["test"] == rows[1]["test"]
    summary = json.loads((tmp_path / "out/vmunet_2d_final/summary.json").read_text())
    assert f"{summary['foreground_mean']['Dice']:.4f}" in (tmp_path / "out/compare.md").read_text()
    words = ["compare", "vmunet:2d", "-d", 7, "--root", tmp_path, "-o"]
    rejected(lambda: run(*words, tmp_path / "out"), "exists")
    rejected(lambda: run("compare", "vmunet", *words[2:], tmp_path / "new"), "vmunet", "NETWORK:CONFIG")


def test_compare_starts_processes(tmp_path):
    log = tmp_path / "a.log"
    with pytest.raises(subprocess.CalledProcessError):
        comparing.run(["nothing"], log)
    assert "$ vmamba medseg nothing" in log.read_text() and "invalid choice: 'nothing'" in log.read_text()
    with pytest.raises(subprocess.TimeoutExpired):
        comparing.run(["train"], log, 0.0)


def test_the_commands_of_the_documentation_parse():
    lines = re.findall(r"^    (vmamba medseg (?:benchmark|compare) (?:.*\\\n)*.*)$", TEXT, re.MULTILINE)
    assert {line.split()[2] for line in lines} == {"benchmark", "compare"}
    for line in lines:
        assert parser().parse_args(shlex.split(line.replace("\\\n", " "))[1:]).command == "medseg"


def test_training_steps_train():
    """With deep supervision where the network has it, switched off for prediction."""
    network = build("PlainConvUNet", TINY)
    example = Example.make(TINY, torch.device("cpu"))
    before = [p.clone() for p in network.parameters()]
    training_step(network, example, "32-true")()
    assert not all(torch.equal(p, q) for p, q in zip(before, network.parameters(), strict=True))
    assert not supervise(network, False) and network(example.image).shape == (2, 3, 16, 16)
    settings = {"features": (4, 8), "strides": ((1, 1), (2, 2))}
    mamba = vmamba.create_model("umamba_bot_2d", num_classes=3, in_chans=1, **settings)
    assert not supervise(mamba, True)  # one decoder level only
    mamba = vmamba.create_model(
        "umamba_bot_2d", num_classes=3, in_chans=1, features=(4, 8, 8), strides=((1, 1), *((2, 2),) * 2)
    )
    assert supervise(mamba, True) and len(mamba(example.image)) == 2
    training_step(mamba, example, "bf16-mixed")()

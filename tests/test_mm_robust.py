"""Trainings of OpenMMLab that meet accidents: killed, out of disk, damaged pictures, files of another network."""

import builtins
import os
import signal
from pathlib import Path

import pytest
import torch
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from tests.mm_faults import no_space
from tests.mm_models import detection_batch, mask_rcnn
from tests.mm_runs import losses, start, train, write_config
from tests.test_mm_models import build, step
from vmamba.checkpoint import read
from vmamba.errors import UserError
from vmamba.mm.saving import WholeFiles

DAMAGED = {  # what becomes of a JPEG's bytes -> what the message says of it
    "truncated": (lambda content: content[:-200], "truncated"),
    "empty": (lambda content: b"", "cannot identify image file"),
    "text": (lambda content: b"404 Not Found", "cannot identify image file"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A configuration with stochastic depth, and the losses of its unbroken run of 8 iterations."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder, drop_path_rate=0.5)
    assert train(config, folder / "run") == 0
    found = losses(folder / "run")
    assert list(found) == [*range(1, 9)]
    return config, found


def test_killed_and_resumed(whole, tmp_path):
    """SIGKILL in the midst of writing a checkpoint: from the last whole one on, losses are those of an unbroken run."""
    config, expected = whole
    text = config.read_text() + "custom_hooks += [dict(type='KillWhileSavingHook', after=6)]\n"
    (tmp_path / "killed.py").write_text(f"{text}train_dataloader.update(num_workers=1)\n")
    command = ["bash", "-c", 'exec "$PYTHON" -m vmamba.tools.cli train killed.py --work-dir run']
    assert start(command, tmp_path).returncode == -signal.SIGKILL
    (partial,) = (tmp_path / "run").glob(".partial-*-iter_6.pth")
    assert [path.name for path in (tmp_path / "run").glob("iter_*.pth")] == ["iter_3.pth"]
    assert train(config, tmp_path / "run", resume=True) == 0
    resumed = losses(tmp_path / "run")
    assert list(resumed) == [*range(1, 9)] and not partial.exists()
    assert [resumed[i] for i in resumed] == pytest.approx([expected[i] for i in resumed], rel=1e-6)
    assert len(list((tmp_path / "run").glob("*/vis_data/scalars.json"))) == 2
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["iter_8.pth"]


def test_a_full_disk(whole, tmp_path, monkeypatch, capsys):
    """The older checkpoint stays, although only one is kept; the message is one line; the run can go on."""
    config, expected = whole
    sync, calls = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(file) or (no_space() if len(calls) == 2 else sync(file)))
    assert train(config, tmp_path / "run") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vmamba: error: ")][-1]
    assert "iter_6.pth: the checkpoint cannot be written (No space left on device)" in error and "--resume" in error
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["iter_3.pth"]
    assert read(tmp_path / "run/iter_3.pth")["meta"]["iter"] == 3
    assert train(config, tmp_path / "run", resume=True) == 0
    assert losses(tmp_path / "run")[8] == pytest.approx(expected[8], rel=1e-6)


def test_a_disk_that_is_full_at_the_pointer(whole, tmp_path, monkeypatch):
    """mmengine writes the name of the last checkpoint in place: it stays that of a checkpoint that is there."""
    config, _ = whole
    opened, writes = builtins.open, []

    def full(file, mode="r", *args, **kwargs):
        if str(file).endswith("last_checkpoint") and mode == "w" and writes.append(file) is None and len(writes) == 2:
            opened(file, mode).close()
            no_space()
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OSError, match="No space left"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    last = Path((tmp_path / "run/last_checkpoint").read_text())
    assert last.name == "iter_3.pth" and read(last)["meta"]["iter"] == 3


def test_whole_files(tmp_path):
    """A file is replaced in one step; one that cannot be written leaves nothing."""
    files, path = WholeFiles(), tmp_path / "folder/a.pth"
    files.put(b"first", path)
    files.put(b"second", path)
    files.remove(path)
    files.rmtree(tmp_path / "folder")
    assert path.read_bytes() == b"second" and os.listdir(path.parent) == ["a.pth"]
    with pytest.raises(UserError, match="cannot be written"):
        files.put(b"third", path / "below.pth")
    assert path.read_bytes() == b"second"
    files.settle()
    assert not path.parent.exists()


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_damaged_pictures(tmp_path, damage, on_error, caplog):
    """The file is named, in a warning or in an error; another picture takes its place in training only."""
    init_default_scope("mmseg")
    write_config(tmp_path, images=2)
    for name in ("0", "1"):
        Image.open(tmp_path / f"images/{name}.png").convert("RGB").save(tmp_path / f"images/{name}.jpg")
    broken, (change, words) = tmp_path / "images/1.jpg", DAMAGED[damage]
    broken.write_bytes(change(broken.read_bytes()))
    data = dict(type="BaseSegDataset", data_root=str(tmp_path), img_suffix=".jpg", seg_map_suffix=".png")
    data |= dict(data_prefix=dict(img_path="images", seg_map_path="labels"), metainfo=dict(classes=("a", "b", "c")))
    load = dict(type="LoadReadable", on_error=on_error)
    data |= dict(pipeline=[load, dict(type="LoadAnnotations"), dict(type="PackSegInputs")])
    dataset = DATASETS.build(data)
    assert dataset[0]["data_samples"].img_path.endswith("0.jpg")
    if on_error == "raise":
        with pytest.raises(UserError, match=f'1.jpg: cannot be read .*{words}.*on_error="skip"'):
            dataset[1]
        return
    warnings = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmamba.mm.readable.print_log", lambda text, **kwargs: warnings.append(text))
        assert dataset[1]["data_samples"].img_path.endswith("0.jpg")
    assert warnings and all("1.jpg" in text and words in text and text.endswith("skipped") for text in warnings)
    with pytest.raises(Exception, match="Test time pip"):
        DATASETS.build({**data, "test_mode": True})[1]


def test_a_choice_of_neither():
    from vmamba.mm import LoadReadable

    with pytest.raises(ValueError, match="on_error must be raise or skip, got 'ignore'"):
        LoadReadable(on_error="ignore")
    assert "on_error='skip'" in repr(LoadReadable(on_error="skip"))


def test_a_checkpoint_of_another_network(whole, tmp_path, capsys):
    """The error lists what is missing and what is too much; nothing is trained."""
    config, _ = whole
    other = build(mask_rcnn("vmamba_tiny_s2l5", drop_path_rate=0.0), "mmdet").state_dict()
    torch.save({"state_dict": other, "meta": {}}, tmp_path / "other.pth")
    assert train(config, tmp_path / "run", f"load_from={tmp_path / 'other.pth'}") == 2
    _, error = capsys.readouterr().err.split("vmamba: error: ")
    assert error.startswith("the checkpoint is not of this backbone")
    assert "body.stages.0.blocks.0.mixer.norm.weight: checkpoint (32,), model (16,)" in error
    assert "in all)" in error and not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.parametrize("sizes", [((800, 1333), (608, 800)), ((31, 31), (112, 137))], ids=["large", "odd"])
def test_a_batch_of_shapes_with_and_without_objects(sizes):
    """Padded to one size; a picture without objects beside one with some; losses are finite, masks fit."""
    model = build(mask_rcnn("vmamba_tiny_s1l8", drop_path_rate=0.0), "mmdet")
    batch, empty = detection_batch(*sizes), detection_batch(*sizes, boxes=0)
    batch["data_samples"][1] = empty["data_samples"][1]
    losses = step(model, batch)
    assert losses["loss_mask"] > 0
    with torch.no_grad():
        results = model.eval().test_step(detection_batch(sizes[0]))
    assert results[0].pred_instances.masks.shape[1:] == sizes[0]

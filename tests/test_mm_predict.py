"""vmamba detect and segment with small networks: outputs, what is kept, what is refused, and the pictures drawn."""

import json
import os
import pprint
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from tests.mm_models import mask_rcnn, upernet
from tests.official_vmamba import official
from vmamba.checkpoint import read
from vmamba.errors import UserError
from vmamba.mm.drawing import Instance, _place, draw_classes, draw_instances, enlargement
from vmamba.mm.journal import Journal
from vmamba.mm.network import Network
from vmamba.mm.palette import Classes, distinct
from vmamba.mm.pictures import find_pictures, why_not_whole
from vmamba.tools.cli import main

NAME = "vmamba_tiny_s1l8"
COLOURS = ((250, 40, 30), (30, 200, 60), (40, 70, 240))
SIZES = {"a": (61, 47), "b": (40, 90), "inner/c": (33, 33)}
TEMPLATE = """\
custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)
default_scope = {scope!r}
model = {model}
test_pipeline = {pipeline}
data = dict(type={data!r}, metainfo=dict(classes=("u", "v", "w")[:{count}]), pipeline=test_pipeline)
test_dataloader = dict(batch_size=1, num_workers=0, dataset=data, sampler=dict(type="DefaultSampler", shuffle=False))
"""
LOAD, ANNOTATIONS = {"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}
KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
KINDS = {  # command -> toolbox, network, data set, classes, transforms of test pictures
    "detect": (
        "mmdet", mask_rcnn, "CocoDataset", 2,
        [LOAD, {"type": "Resize", "scale": (96, 64), "keep_ratio": True}, {**ANNOTATIONS, "with_mask": True},
         {"type": "PackDetInputs", "meta_keys": KEYS}],
    ),
    "segment": ("mmseg", upernet, "BaseSegDataset", 3, [LOAD, ANNOTATIONS, {"type": "PackSegInputs"}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with detect.py and .pth, segment.py and .pth, and three pictures of SIZES, one of them in a folder."""
    root = tmp_path_factory.mktemp("made")
    for command, (scope, network, data, count, pipeline) in KINDS.items():
        model = network(NAME, drop_path_rate=0.0)
        values = dict(
            scope=scope, model=pprint.pformat(model), data=data, count=count, pipeline=pprint.pformat(pipeline)
        )
        (root / f"{command}.py").write_text(TEMPLATE.format(**values))
        meta = {"dataset_meta": {"classes": ("cat", "dog", "owl")[:count], "palette": [*map(list, COLOURS[:count])]}}
        logs = {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}}
        torch.save({"meta": meta, "state_dict": weights(model, scope), "message_hub": logs}, root / f"{command}.pth")
    generator = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        path = root / f"photos/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        low = Image.fromarray(generator.integers(256, size=(5, 6, 3), dtype=np.uint8))
        low.resize((width, height), Image.Resampling.BILINEAR).save(path)
    return root


def weights(cfg, scope):
    """Random weights under which every class is predicted somewhere."""
    init_default_scope(scope)
    torch.manual_seed(0)
    with MODELS.switch_scope_and_registry(scope) as registry:
        model = registry.build(Config({"model": cfg}).model)
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv_seg" in name or "fc_cls" in name or "conv_logits" in name:
                parameter.normal_(std=1.0)
    return model.state_dict()


@pytest.fixture
def command(made, tmp_path):
    """command("detect", *words) -> exit code; outputs lie in tmp_path / "out"."""

    def call(kind, *words, images=(made / "photos",)):
        files = ["--config", made / f"{kind}.py", "--checkpoint", made / f"{kind}.pth", "--device", "cpu"]
        return main([kind, *map(str, [*images, *files, "-o", tmp_path / "out", *words])])

    return call


def load(path):
    return json.loads(Path(path).read_text())


def pixels(path):
    return np.asarray(Image.open(path))


def test_detect(made, command, tmp_path, capsys):
    """Results are those of mmdet's own inference, in files that COCO's tools read."""
    from mmdet.apis import inference_detector, init_detector

    out = tmp_path / "out"
    assert command("detect", "-r", "--score-threshold", "0.25") == 0
    assert "3 pictures" in capsys.readouterr().out
    coco: Any = COCO(out / "images.json")
    results: Any = coco.loadRes(str(out / "results.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["cat", "dog"]
    model, found = init_detector(str(made / "detect.py"), str(made / "detect.pth"), device="cpu"), 0
    expected: Any
    for entry in coco.loadImgs(coco.getImgIds()):
        image = pixels(made / "photos" / entry["file_name"])
        assert image.shape == (entry["height"], entry["width"], 3)
        expected = inference_detector(model, str(made / "photos" / entry["file_name"]))
        expected = expected.pred_instances
        expected = expected[expected.scores >= 0.25]
        ours = results.loadAnns(results.getAnnIds(entry["id"]))
        assert len(ours) == len(expected)
        for one, score, label, box, mask in zip(ours, *(expected[k] for k in KEYS_OF_INSTANCES), strict=True):
            x, y, width, height = one["bbox"]
            assert one["score"] == pytest.approx(float(score), abs=1e-4) and one["category_id"] == int(label) + 1
            assert torch.tensor([x, y, x + width, y + height]).allclose(box, atol=0.01)
            assert np.array_equal(rle.decode(one["segmentation"]), mask.numpy())
        overlay = pixels(out / "overlays" / entry["file_name"])
        times = enlargement(*image.shape[:2])
        assert overlay.shape == (times * entry["height"], times * entry["width"], 3)
        found += len(ours)
    assert found > 2
    summary = load(out / "summary.json")
    assert summary["pictures"] == summary["new"] == 3 and sum(summary["counts"].values()) == found
    assert summary["score_threshold"] == 0.25 and summary["device"] == "cpu" and not summary["failed"]


KEYS_OF_INSTANCES = ("scores", "labels", "bboxes", "masks")


def test_segment(made, command, tmp_path):
    """Labels are those of mmseg's own inference; overlays tint each pixel in the colour of its class."""
    from mmseg.apis import inference_model, init_model

    out, seen = tmp_path / "out", set()
    assert command("segment", "--recursive") == 0
    classes = load(out / "classes.json")
    assert [(c["index"], c["name"], tuple(c["colour"])) for c in classes] == [
        (i, name, COLOURS[i]) for i, name in enumerate(("cat", "dog", "owl"))
    ]
    model = init_model(str(made / "segment.py"), str(made / "segment.pth"), device="cpu")
    for name, (height, width) in SIZES.items():
        source = made / f"photos/{name}.png"
        with Image.open(out / f"labels/{name}.png") as file:
            assert file.mode == "L"
            labels = np.asarray(file)
        expected: Any = inference_model(model, str(source))
        assert np.array_equal(labels, expected.pred_sem_seg.data[0].numpy())
        seen |= set(labels.flat)
        times = enlargement(height, width)
        overlay = pixels(out / f"overlays/{name}.png")[: times * height : times, : times * width : times].astype(int)
        tinted = (pixels(source) / 2 + np.array(COLOURS)[labels] / 2).round()
        right = np.abs(overlay - tinted).max(-1) <= 1
        inner = times > 1  # the first pixel of each block lies within it, so it is no edge
        assert right.all() if inner else right.mean() > 0.5
    assert seen == {0, 1, 2}
    counts = load(out / "summary.json")["counts"]
    assert set(counts) == {"cat", "dog", "owl"} and sum(counts.values()) == sum(h * w for h, w in SIZES.values())


@pytest.fixture
def calls(monkeypatch):
    """Names of the pictures that a network was asked about."""
    names, ask = [], Network.predict

    def predict(self, path):
        names.append(path.stem)
        return ask(self, path)

    monkeypatch.setattr(Network, "predict", predict)
    return names


def test_finished_pictures_are_kept(made, command, tmp_path, calls, capsys):
    photos, out = shutil.copytree(made / "photos", tmp_path / "photos"), tmp_path / "out"
    assert command("segment", images=[photos]) == 0 and calls == ["a", "b"]
    assert command("segment", "-r", images=[photos]) == 0 and calls == ["a", "b", "c"]
    assert "3 pictures, of which 2 kept from before" in capsys.readouterr().out
    (out / "overlays/a.png").unlink()
    journal = (out / "journal.jsonl").read_bytes()
    (out / "journal.jsonl").write_bytes(journal[:-20])  # a crash while the last line, that of c, was written
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(photos / "b.png")
    calls.clear()
    assert command("segment", "-r", images=[photos]) == 0 and calls == ["a", "b", "c"]
    assert pixels(out / "labels/b.png").shape == (30, 40)
    calls.clear()
    assert command("segment", "-r", images=[photos]) == 0 and not calls
    summary = load(out / "summary.json")
    assert (summary["pictures"], summary["new"], summary["kept"]) == (3, 0, 3)
    ids = [json.loads(line)["id"] for line in (out / "journal.jsonl").read_text().splitlines()[1:]]
    assert sorted(ids) == [1, 2, 3]


def test_a_folder_holds_results_of_one_kind(made, command, tmp_path, calls, capsys):
    one = [made / "photos/a.png"]
    assert command("detect", images=one) == 0
    assert "score_threshold 0.3 (now 0.4)" in refusal(capsys, command, "detect", "--score-threshold", "0.4", images=one)
    assert "command detect (now segment)" in refusal(capsys, command, "segment", images=one)
    other = read(made / "detect.pth")
    other["state_dict"]["roi_head.bbox_head.fc_cls.bias"] += 1
    torch.save(other, tmp_path / "other.pth")
    assert "weights " in refusal(capsys, command, "detect", "--checkpoint", tmp_path / "other.pth", images=one)
    copy = shutil.copy(one[0], tmp_path / "a.png")
    assert "is of " in refusal(capsys, command, "detect", images=[copy])
    assert calls == ["a"]
    assert command("detect", "--score-threshold", "0", "--overwrite", images=[made / "photos/b.png"]) == 0
    assert [path.name for path in (tmp_path / "out/overlays").iterdir()] == ["b.png"]
    assert {entry["file_name"] for entry in load(tmp_path / "out/images.json")["images"]} == {"b.png"}


def refusal(capsys, call, *words, **options):
    """The one line of an error with exit code 2."""
    capsys.readouterr()
    assert call(*words, **options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vmamba: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("vmamba: error: ")


def test_interrupted(made, command, tmp_path, monkeypatch, capsys):
    """Ctrl-C leaves results of what is finished, and the same command goes on there."""
    ask = Network.predict

    def predict(self, path):
        if path.stem == "b":
            raise KeyboardInterrupt
        return ask(self, path)

    monkeypatch.setattr(Network, "predict", predict)
    assert command("detect", "-r") == 130
    assert "stopped: the same command goes on there" in capsys.readouterr().out
    assert load(tmp_path / "out/summary.json")["stopped"]
    assert len(load(tmp_path / "out/images.json")["images"]) == 1
    monkeypatch.setattr(Network, "predict", ask)
    assert command("detect", "-r") == 0
    assert [entry["id"] for entry in load(tmp_path / "out/images.json")["images"]] == [1, 2, 3]


def test_damaged_pictures_are_named_and_left_out(made, command, tmp_path, capsys):
    photos = shutil.copytree(made / "photos", tmp_path / "photos")
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(80, 80, 3), dtype=np.uint8))
    for ending in ("jpg", "png"):
        noise.save(photos / f"cut_{ending}.{ending}")
        whole = (photos / f"cut_{ending}.{ending}").read_bytes()
        (photos / f"cut_{ending}.{ending}").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.png").touch()
    (photos / "notes.txt").write_text("no picture")
    bad = {"cut_jpg.jpg": "truncated", "cut_png.png": "truncated", "empty.png": "empty", "notes.txt": "no picture of a"}
    assert command("segment", images=[photos, photos / "notes.txt"]) == 1
    captured = capsys.readouterr()
    assert "2 pictures" in captured.out and "4 left out" in captured.out
    failed = load(tmp_path / "out/summary.json")["failed"]
    assert {Path(path).name for path in failed} == bad.keys()
    for path, reason in failed.items():
        assert bad[Path(path).name] in reason and f"vmamba: {path}: {reason}; left out" in captured.err
    assert sorted(path.stem for path in (tmp_path / "out/labels").iterdir()) == ["a", "b"]


def test_a_picture_that_the_network_cannot_take(made, command, tmp_path, monkeypatch):
    ask = Network.predict

    def predict(self, path):
        if path.stem == "a":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
        return ask(self, path)

    monkeypatch.setattr(Network, "predict", predict)
    assert command("segment") == 1
    (reason,) = load(tmp_path / "out/summary.json")["failed"].values()
    assert reason == "CUDA out of memory. Tried to allocate 20 GiB"


class Evil:
    """A pickle that makes a file when it is loaded by a reader that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_mistakes_are_one_line(made, command, tmp_path, capsys):
    def error(*words, **options):
        return refusal(capsys, command, *words, **options)

    empty = tmp_path / "empty"
    (empty / "inner").mkdir(parents=True)
    (tmp_path / "taken").touch()
    torch.save({"meta": {}, "state_dict": {}, "x": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    (tmp_path / "nonsense.pth").write_bytes(b"nonsense")
    assert error("detect", images=["nowhere.jpg"]) == "no picture or folder at nowhere.jpg"
    assert "no picture in" in error("detect", images=[empty]) and "--recursive" in error("detect", images=[empty])
    assert "no picture in no*where.jpg" in error("detect", images=["no*where.jpg"])
    assert "describes a segmentor (mmseg); take vmamba segment" in error("detect", "--config", made / "segment.py")
    assert "describes a detector (mmdet); take vmamba detect" in error("segment", "--config", made / "detect.py")
    assert error("detect", "--config", "nowhere.py") == "no configuration at nowhere.py"
    assert "no checkpoint at nowhere.pth" in error("detect", "--checkpoint", "nowhere.pth")
    assert "not a readable checkpoint" in error("detect", "--checkpoint", tmp_path / "nonsense.pth")
    assert "could run code and are not loaded" in error("detect", "--checkpoint", tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    assert "choose auto, cpu or cuda" in error("detect", "--device", "abacus")
    assert "--score-threshold must be from 0 to 1, got 3" in error("detect", "--score-threshold", "3")
    assert "taken/out: " in error("detect", "-o", tmp_path / "taken/out")
    assert not (tmp_path / "out").exists()


def test_configurations_that_are_none(made, command, tmp_path, capsys):
    def error(text):
        (tmp_path / "odd.py").write_text(text)
        return refusal(capsys, command, "segment", "--config", tmp_path / "odd.py")

    good = (made / "segment.py").read_text()
    assert "nowhere.py" in error("_base_ = 'nowhere.py'\n")
    assert "has no model" in error("default_scope = 'mmseg'\n")
    assert "cannot be built: " in (unknown := error(good.replace("VMambaBackbone", "OtherBackbone")))
    assert "OtherBackbone" in unknown
    assert "describes no segmentor but a UPerHead" in error(f"{good}\nmodel = model['decode_head']\n")
    assert "no transforms for test pictures" in error(f"{good}\ndel test_pipeline, test_dataloader, data\n")
    unnamed = f"{good}\ntest_dataloader['dataset']['metainfo'] = dict(classes=('one',))\n"
    (tmp_path / "odd.py").write_text(unnamed)
    content = read(made / "segment.pth")
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "bare.pth")
    files = ("--config", tmp_path / "odd.py", "--checkpoint", tmp_path / "bare.pth")
    assert "head has 3 classes, but the configuration names 1: one" in refusal(capsys, command, "segment", *files)


def test_checkpoints_of_other_networks(made, command, tmp_path, capsys):
    """All weights of the network, or an error with their names."""
    content = read(made / "segment.pth")
    state = content["state_dict"]

    def error(state):
        torch.save({**content, "state_dict": state}, tmp_path / "other.pth")
        return refusal(capsys, command, "segment", "--checkpoint", tmp_path / "other.pth")

    head = "decode_head.conv_seg.weight"
    assert f"missing: {head}" in error({key: t for key, t in state.items() if key != head})
    assert "unexpected: neck.x" in error({**state, "neck.x": torch.zeros(1)})
    assert "decode_head.conv_seg.weight" in error({**state, head: torch.zeros(7, 8, 1, 1)})
    first = next(key for key in state if key.startswith("backbone.") and key.endswith("weight"))
    assert first.removeprefix("backbone.pyramid.") in error({key: t for key, t in state.items() if key != first})
    detector = refusal(capsys, command, "segment", "--checkpoint", made / "detect.pth")
    assert "missing: decode_head" in detector and "unexpected: neck." in detector and "in all)" in detector


def test_checkpoints_in_other_wrappings(made, command, tmp_path):
    """Official names, module. before them, no auxiliary head and no names of classes: the same labels."""
    content = read(made / "segment.pth")
    with MODELS.switch_scope_and_registry("mmseg") as registry:
        model = registry.build(Config.fromfile(made / "segment.py").model)
    model.load_state_dict(content["state_dict"])
    pyramid = model.backbone.pyramid
    state = {key: t for key, t in model.state_dict().items() if not key.startswith(("backbone.", "auxiliary_head."))}
    state |= {f"backbone.{key}": t for key, t in official(pyramid.body).items()}
    for i, norm in enumerate(pyramid.norms):
        state |= {f"backbone.outnorm{i}.{key}": t for key, t in norm.state_dict().items()}
    torch.save({"state_dict": {f"module.{key}": t for key, t in state.items()}}, tmp_path / "official.pth")
    assert command("segment") == 0
    words = ("--checkpoint", tmp_path / "official.pth", "-o", tmp_path / "other")
    assert command("segment", *words) == 0
    for name in ("a", "b"):
        assert np.array_equal(
            pixels(tmp_path / f"out/labels/{name}.png"), pixels(tmp_path / f"other/labels/{name}.png")
        )
    assert [entry["name"] for entry in load(tmp_path / "other/classes.json")] == ["u", "v", "w"]


def test_a_missing_toolbox_is_named(command, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr("vmamba.tools.mm_predict.import_module", missing)
    assert "vmamba detect needs mmcv" in (text := refusal(capsys, command, "detect")) and "make mm" in text


def test_names_of_pictures(tmp_path):
    for name in ("one/1.jpg", "one/2.PNG", "two/1.jpg", "two/deep/3.jpg", "one/notes.txt", "out/overlays/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "two/4.jpg").symlink_to(tmp_path / "one/1.jpg")

    def names(*inputs, **options):
        return list(find_pictures([str(tmp_path / text) for text in inputs], **options))

    assert names("one/1.jpg") == ["1"] and names("one") == ["1", "2"]
    assert names("one/1.jpg", "two/1.jpg") == ["one/1", "two/1"]
    assert names("two") == ["1", "4"] and names("two", recursive=True) == ["1", "4", "deep/3"]
    assert names("*/*.jpg", "one") == ["one/1", "one/2", "two/1", "two/4"]
    assert names("**/*.jpg") == ["one/1", "two/1", "two/4", "two/deep/3"]
    everything = names(".", recursive=True, without=[tmp_path / "out/overlays"])
    assert everything == ["one/1", "one/2", "two/1", "two/4", "two/deep/3"]
    (tmp_path / "one/1.png").touch()
    with pytest.raises(UserError, match=r"1\.jpg and .*1\.png would have the same output, 1\.png"):
        names("one")
    (tmp_path / "odd[1].jpg").touch()
    assert names("odd[1].jpg") == ["odd[1]"]


def test_whole_pictures(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    assert why_not_whole(tmp_path / "a.png") is None
    assert "No such file" in str(why_not_whole(tmp_path / "b.png"))


def test_journals_of_other_versions(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"journal": 99, "weights": "1"}\nnonsense\n[1]\n')
    with pytest.raises(UserError, match="a journal of another version"):
        Journal(tmp_path, {"weights": "1"}, ["overlays"])
    assert Journal(tmp_path, {"weights": "1"}, ["overlays"], overwrite=True).records == {}


def test_classes():
    def found(meta, metainfo=None, count: int | None = 2):
        return Classes.find(meta, lambda: metainfo or {}, count)

    new = found({"dataset_meta": {"CLASSES": ["a", "b"], "palette": [(1, 2, 3), (4, 5, 6)]}})
    assert (new.names, new.colours, new.origin) == (("a", "b"), ((1, 2, 3), (4, 5, 6)), "checkpoint")
    old = found({"CLASSES": ("a", "b"), "PALETTE": [[0], [1]]})
    assert old.names == ("a", "b") and old.colours == (distinct(0), distinct(1))
    assert found({}, {"classes": ("c", "d"), "palette": "random"}).origin == "configuration"
    assert found(None).names == ("class 0", "class 1") and found(None, count=None).name(7) == "class 7"
    assert found(None).colour(9) == distinct(9) and len({distinct(i) for i in range(150)}) == 150
    with pytest.raises(UserError, match="head has 2 classes, but the configuration names 3: a, b, c"):
        found({}, {"classes": ["a", "b", "c"]})


CLASSES = Classes(("cat", "dog", "a long name of an owl"), COLOURS, "checkpoint")


def test_an_overlay_shows_the_mask_where_it_is():
    """Inside a mask the picture is mixed with the class's colour, its rim is that colour, and the rest is untouched."""
    image = np.random.default_rng(0).integers(256, size=(600, 700, 3), dtype=np.uint8)
    y, x = np.mgrid[:600, :700]
    mask = (x - 350) ** 2 + (y - 300) ** 2 < 150**2
    drawn = np.asarray(draw_instances(image, [Instance(1, 0.75, (200, 150, 501, 451), mask)], CLASSES)).astype(int)
    inside = (x - 350) ** 2 + (y - 300) ** 2 < 140**2
    around = (x < 195) | (x > 505) | (y < 120) | (y > 455)
    mixed = (image / 2 + np.array(COLOURS[1]) / 2).round()
    assert np.abs(drawn - mixed)[inside].max() <= 1 and np.array_equal(drawn[around], image[around])
    assert np.array_equal(drawn[300, 350 + 149], COLOURS[1])  # the rim
    assert np.array_equal(drawn[151, 400], COLOURS[1]) and np.array_equal(drawn[400, 201], COLOURS[1])  # the box
    between = ~mask & (x > 206) & (x < 496) & (y > 156) & (y < 446)
    assert np.array_equal(drawn[between], image[between])


def test_overlays_of_tiny_and_oblong_pictures():
    for height, width in ((1, 1), (3, 500), (31, 7)):
        image, times = np.zeros((height, width, 3), np.uint8), enlargement(height, width)
        box = (-2.0, -2.0, width + 5.0, height + 5.0)
        whole = Instance(2, 0.5, box, np.ones((height, width), bool))
        drawn = draw_instances(image, [whole, Instance(0, 0.4, box), Instance(0, 0.3, box)], CLASSES)
        assert drawn.size == (times * width, times * height) and np.asarray(drawn).any()
        labels = np.arange(height * width).reshape(height, width) % 3
        sheet = np.asarray(draw_classes(image, labels, CLASSES))
        legend = sheet[times * height :].reshape(-1, 3)
        shown = {colour for colour in COLOURS if (legend == colour).all(1).sum() > 50}
        assert shown == {COLOURS[i] for i in np.unique(labels)}
    assert draw_instances(image, [], CLASSES).size == (times * 7, times * 31)


def test_texts_do_not_cover_each_other():
    taken = []
    for _ in range(4):
        taken.append(_place((100, 100, 160, 200), (40, 12), (300, 300), taken))
    assert len(set(taken)) == 4 and taken[0] == (100, 88, 140, 100)
    right_of = _place((280, 5, 299, 50), (60, 12), (300, 300), [])
    assert right_of == (240, 5, 300, 17)  # no place above it: inside, and within the picture

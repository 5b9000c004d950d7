"""Training with OpenMMLab: data of shapes, runs that can be repeated on any number of processes, curves."""

import ast
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image

from tests.mm_runs import ROOT, losses, start, train, write_config
from tests.timm_zoo import shrunk
from vmamba.mm import BlockwiseFSDP, MeanLossHook, NumberedSampler, SeedByIterationHook, SeedBySample
from vmamba.mm.curves import draw, read_run
from vmamba.shape_data import annotation, labels, run_lengths
from vmamba.shapes import CLASSES, picture
from vmamba.tools.cli import main

DEMOS = sorted((ROOT / "configs/demo").glob("*_shapes.py"))
NARROW = {"out_channels": 8, "feat_channels": 8, "conv_out_channels": 8, "fc_out_channels": 16, "channels": 8}
NARROW |= {"num_convs": 1, "norm_cfg": dict(type="GN", num_groups=2), "nms_pre": 50, "max_per_img": 20}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder with ``data/shapes``: 3 pictures to train on, 2 to validate."""
    folder = tmp_path_factory.mktemp("shapes")
    words = ["shapes", str(folder / "data/shapes"), "--images", "3", "--val", "2", "--seed", "4", "--no-progress"]
    assert main(words) == 0
    return folder


def test_pictures():
    """The same for the same numbers; masks apart, within bounds, of every class; some pictures without shapes."""
    drawn = [picture(0, number) for number in range(20)]
    again = picture(0, 3)
    assert np.array_equal(again.image, drawn[3].image) and not np.array_equal(again.image, picture(1, 3).image)
    for image, found in drawn:
        assert image.dtype == np.uint8 and image.shape[2] == 3 and all(224 <= side <= 320 for side in image.shape[:2])
        assert all(shape.mask.shape == image.shape[:2] and shape.mask.sum() > 100 for shape in found)
        assert not found or sum(shape.mask.astype(int) for shape in found).max() == 1
    assert {shape.label for _, found in drawn for shape in found} == {*range(len(CLASSES))}
    counts = [len(found) for _, found in drawn]
    assert min(counts) == 0 and max(counts) == 6


def test_contrast():
    """A shape's mean colour differs from that of its surroundings."""
    for number in range(20):
        image, found = picture(2, number)
        rest = np.logical_not(np.any([shape.mask for shape in found], 0)) if found else None
        for shape in found:
            y, x = np.nonzero(shape.mask)
            box = np.s_[y.min() : y.max() + 1, x.min() : x.max() + 1]
            around = image[box][rest[box]]
            assert len(around) < 50 or abs(image[shape.mask].mean(0) - around.mean(0)).mean() > 15


def test_run_lengths():
    from pycocotools import mask as coco

    for mask in (np.eye(5, 3, dtype=bool), np.ones((2, 3), bool), np.zeros((3, 2), bool), picture(0, 0).shapes[0].mask):
        runs = {"size": list(mask.shape), "counts": run_lengths(mask)}
        assert sum(runs["counts"]) == mask.size
        assert np.array_equal(coco.decode(coco.frPyObjects(runs, *mask.shape)), mask)
    box = annotation(1, np.pad(np.ones((2, 4), bool), ((3, 1), (5, 2))))
    assert box["bbox"] == [5, 3, 4, 2] and box["area"] == 8 and box["category_id"] == 2


def test_layouts(shapes):
    """mmdet and mmseg read what was drawn: masks, boxes, classes, labels."""
    root, drawn = shapes / "data/shapes", [picture(4, number) for number in range(5)]
    coco = dict(type="mmdet.CocoDataset", data_root=f"{root}/coco/", metainfo=dict(classes=CLASSES), test_mode=True)
    load = [dict(type="LoadReadable"), dict(type="mmdet.LoadAnnotations", with_bbox=True, with_mask=True)]
    read = dict(**coco, ann_file="annotations/instances_val2017.json", data_prefix=dict(img="val2017/"), pipeline=load)
    init_default_scope("mmdet")
    dataset = DATASETS.build(read)
    for sample, (_, found) in zip(dataset, drawn[3:], strict=True):
        assert np.array_equal(sample["gt_bboxes_labels"], [shape.label for shape in found])
        masks = np.stack([shape.mask for shape in found])
        assert np.array_equal(sample["gt_masks"].masks, masks)
        expected = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in map(np.nonzero, masks)]
        assert np.array_equal(sample["gt_bboxes"].tensor, expected)
    for number in range(3):
        saved = np.array(Image.open(root / f"ade/annotations/training/{number:06d}.png"))
        assert np.array_equal(saved, labels(drawn[number])) and saved.min() >= 1
        pixels = [
            np.array(Image.open(root / path / f"{number:06d}.jpg")).astype(int)
            for path in ("coco/train2017", "ade/images/training")
        ]
        assert np.array_equal(*pixels) and abs(pixels[0] - drawn[number].image).mean() < 6


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--val", "0"], "0 to validate"), ([], "exists; give another folder"), (["--images", "-1"], "-1 pictures")],
)
def test_mistakes_with_shapes(shapes, capsys, words, message):
    assert main(["shapes", str(shapes / "data/shapes"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["shapes", str(tmp_path / "file/below"), "--images", "1", "--val", "1", "--no-progress"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def narrow(node, values):
    """Put ``values`` in the place of those under the same keys anywhere in ``node``."""
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        narrow(child, values)
    if isinstance(node, dict):
        node.update({key: value for key, value in values.items() if key in node})


def small(path: Path) -> Config:
    """A demonstration's configuration with a small network, without worker processes."""
    cfg = Config.fromfile(path)
    cfg.model.backbone.update(shrunk(cfg.model.backbone.variant))
    channels = list(MODELS.build(cfg.model.backbone).channels)
    for part in ("neck", "rpn_head", "roi_head", "train_cfg", "decode_head", "auxiliary_head"):
        narrow(cfg.model.get(part), {**NARROW, "in_channels": 8, "num": 16})
    if "neck" in cfg.model:
        cfg.model.neck.in_channels = channels
    else:
        cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels = channels, channels[2]
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg[loader].update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.batch_size = 2
    return cfg


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_demonstrations(path, shapes, monkeypatch):
    """Short and explained; the network takes a step and is scored on the data of ``vmamba shapes``."""
    text = path.read_text()
    doc, command = ast.get_docstring(ast.parse(text)) or "", f"vmamba train {path.relative_to(ROOT)} --amp bfloat16\n"
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 120
    assert "    vmamba shapes data/shapes\n" in doc and command in doc
    assert all(f"\n{field}: " in doc for field in ("Hardware", "Expected", "Source"))
    monkeypatch.chdir(shapes)
    cfg = small(path)
    cfg.update(work_dir=str(shapes / path.stem), experiment_name=path.stem)
    steps = cfg.train_cfg.max_iters
    assert max(item["end"] for item in cfg.param_scheduler) == steps and steps % cfg.train_cfg.val_interval == 0
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    cfg.param_scheduler, cfg.default_hooks.logger.interval = None, 1
    Runner.from_cfg(cfg).train()
    run = read_run(shapes / path.stem)
    assert np.isfinite(run.train[1]["loss"]) and run.train[1]["loss"] > 0
    scores = {"mask": {"coco/bbox_mAP_50", "coco/segm_mAP_50"}, "upern": {"mIoU"}}[
        path.stem[: 4 + path.stem.startswith("u")]
    ]
    assert scores <= set(run.metrics)
    assert list((shapes / path.stem).glob("best_*_iter_1.pth")) and (shapes / path.stem / "iter_1.pth").is_file()


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_two_processes_learn_like_one(sharded, tmp_path):
    """Two processes over gloo: the losses, means over both, are those of one process with the doubled batch.

    So are those where FSDP shares the weights out; it saves the usual checkpoint, of whole weights.
    """
    config, port = write_config(tmp_path), 29719 if sharded else 29717
    two = tmp_path / "two.py"
    two.write_text(config.read_text() + (SHARDED if sharded else ""))
    command = ["bash", str(ROOT / "tools/dist_train.sh"), str(two), "2", "--work-dir", str(tmp_path / "two")]
    ran = start(command, tmp_path, port, VMAMBA_BACKEND="reference")  # NumPy's views forbid FSDP to free weights
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert train(config, tmp_path / "one", "train_dataloader.batch_size=4") == 0
    one, two = (list(losses(tmp_path / name).values()) for name in ("one", "two"))
    assert len(one) == 8 and two == pytest.approx(one, rel=3e-6)
    assert min(abs(a - b) for a, b in itertools.combinations(one, 2)) > 1e-4  # each iteration has a loss of its own
    weights = [torch.load(tmp_path / name / "iter_8.pth", weights_only=False)["state_dict"] for name in ("one", "two")]
    assert list(weights[0]) == list(weights[1])
    differences = [(a - b).abs().mean() for a, b in zip(*(found.values() for found in weights), strict=True)]
    assert max(differences) < 1e-3  # in eight steps of up to 1e-3: where there is no gradient, rounding steers them


def test_moving_average_of_the_weights(tmp_path):
    """The average is kept, saved beside the weights, and is what validation sees; a run goes on with it."""
    config = write_config(tmp_path)
    config.write_text(config.read_text() + 'custom_hooks.append(dict(type="EMAHook", momentum=0.5))\n')
    assert train(config, tmp_path / "run", "train_cfg.max_iters=4") == 0
    saved = torch.load(tmp_path / "run/iter_4.pth", weights_only=False)
    average, weights = saved["ema_state_dict"], saved["state_dict"]
    name = "decode_head.conv_seg.weight"
    assert float((average[f"module.{name}"] - weights[name]).abs().max()) > 0 and average["steps"] == 4
    assert train(config, tmp_path / "run", resume=True) == 0
    assert torch.load(tmp_path / "run/iter_8.pth", weights_only=False)["ema_state_dict"]["steps"] == 8


SHARDED = """
runner_type = "FlexibleRunner"
full = dict(  # as state_dict_cfg="full", which moves to the CPU what is there already and is freed then
    state_dict_type="FULL_STATE_DICT",
    state_dict_config=dict(type="FullStateDictConfig", rank0_only=True),
    optim_state_dict_config=dict(type="FullOptimStateDictConfig", rank0_only=True),
)
strategy = dict(type="FSDPStrategy", model_wrapper=dict(type="BlockwiseFSDP"), state_dict_cfg=full)
env_cfg = dict(cudnn_benchmark=False)
"""


class Letters(torch.utils.data.Dataset):
    """What the numbered samples draw."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index):
        SeedBySample()({"sample_idx": index})
        return int(index), random.random(), np.random.rand()


def drawn(workers: int, batch: int, skip: int = 0) -> list:
    sampler = NumberedSampler(Letters(), shuffle=True, seed=3)
    sampler.skip(skip)
    loader = torch.utils.data.DataLoader(Letters(), batch, sampler=sampler, num_workers=workers)
    samples = iter(loader)
    rows = [np.stack(next(samples), 1) for _ in range(12 // batch)]
    return np.concatenate(rows).tolist()


def test_samples_can_be_repeated():
    """Index and random numbers of the n-th sample do not depend on workers, batches, or where the run began."""
    first = drawn(0, 2)
    assert first == drawn(2, 3) and first[4:] == drawn(0, 1, skip=4)[:8]
    assert len({tuple(row) for row in first}) == 12 and len({row[0] for row in first[:5]}) == 5


def test_a_sample_without_a_number():
    with pytest.raises(TypeError, match=r"SeedBySample needs sampler=dict\(type='NumberedSampler'\); got the index 7"):
        SeedBySample()({"sample_idx": 7})


def test_iterations_can_be_repeated():
    """What a network draws depends on seed, iteration and process, not on what was drawn before."""

    def draw(seed, iteration, rank):
        runner = type("Runner", (), {"seed": seed, "iter": iteration, "rank": rank})
        SeedByIterationHook().before_train_iter(runner, 0)
        return torch.rand(()).item()

    first = draw(0, 5, 0)
    torch.rand(9)
    assert draw(0, 5, 0) == first
    assert len({first, draw(1, 5, 0), draw(0, 6, 0), draw(0, 5, 1), draw(None, 4, 1)}) == 5


def test_means_of_losses(monkeypatch):
    """Over the processes; what is no scalar is left alone."""
    seen = []
    monkeypatch.setattr("vmamba.mm.repeatable.get_world_size", lambda: 2)
    monkeypatch.setattr("vmamba.mm.repeatable.all_reduce", lambda x, how: seen.append((x.tolist(), how)) or x.mul_(10))
    outputs = {"loss": torch.tensor(2.0, requires_grad=True), "maps": torch.ones(3), "acc": torch.tensor(5.0)}
    MeanLossHook().after_train_iter(None, 0, None, outputs)
    assert seen == [([2.0, 5.0], "mean")] and outputs["loss"].item() == 20 and outputs["acc"].item() == 50
    assert torch.equal(outputs["maps"], torch.ones(3)) and not outputs["loss"].requires_grad
    monkeypatch.setattr("vmamba.mm.repeatable.get_world_size", lambda: 1)
    MeanLossHook().after_train_iter(None, 0, None, outputs)
    assert len(seen) == 1


def log(folder: Path, start: str, *rows: dict, end: str = "") -> None:
    file = folder / start / "vis_data/scalars.json"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_curves(tmp_path, capsys):
    """Of a run that was killed after iteration 40 and went on from 20: what was trained twice counts once."""
    run = tmp_path / "mask_rcnn"
    metric = {"coco/bbox_mAP": 0.2, "coco/segm_mAP_50": 0.5, "coco/bbox_mAP_s": -1.0, "time": 1.0}
    rows = [{"loss": 4.0 - i / 20, "lr": 0.1, "step": i} for i in (10, 20, 30, 40)]
    log(run, "20260101_000000", *rows[:2], {**metric, "step": 20}, *rows[2:], end='{"loss": 1')
    log(run, "20260102_000000", {"loss": 2.4, "lr": 0.1, "step": 30}, {**metric, "coco/bbox_mAP": 0.4, "step": 40})
    other = tmp_path / "upernet"
    log(other, "20260101_000000", {"loss": 1.0, "step": 5}, {"mIoU": 77.0, "aAcc": 90.0, "step": 5})
    read = read_run(run)
    assert {step: row["loss"] for step, row in read.train.items()} == {10: 3.5, 20: 3.0, 30: 2.4}
    assert list(read.val) == [20, 40] and read.metrics == ("coco/segm_mAP_50", "coco/bbox_mAP")
    output = tmp_path / "pictures/curves.png"
    assert main(["curves", str(run), str(other), "-o", str(output)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "mask_rcnn: loss 2.4; coco/segm_mAP_50 0.5, coco/bbox_mAP 0.4",
        "upernet: loss 1; mIoU 77, aAcc 90",
    ]
    content = json.loads(output.with_suffix(".json").read_text())
    assert content["mask_rcnn"]["train"] == {"step": [10, 20, 30], "loss": [3.5, 3.0, 2.4], "lr": [0.1] * 3}
    assert content["upernet"]["final"] == {"mIoU": 77.0, "aAcc": 90.0}
    assert len(draw([read, read_run(other)]).axes) == 4 and len(draw([read, read]).axes) == 2
    assert Image.open(output).size > (1000, 600)


def test_mistakes_with_curves(tmp_path, capsys):
    log(tmp_path / "damaged", "20260101_000000", {"loss": 1.0, "step": 1}, end='{"loss"\n{"loss": 1.0, "step": 2}\n')
    for words, message in (
        ([tmp_path, "-o", "a.png"], "no logs of a training"),
        ([tmp_path, "-o", "a.pdf"], "must end in .png"),
        ([tmp_path / "damaged", "-o", "a.png"], "line 2 is damaged"),
    ):
        assert main(["curves", *map(str, words)]) == 2
        assert re.search(message, capsys.readouterr().err)


class Wrapped(torch.nn.Module):
    """As FSDP wraps a module: under a name of its own in the names of parameters."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def test_groups_of_a_wrapped_model():
    """Learning rates and weight decay are those of the same model that is not wrapped."""
    from tests.test_mm_schedule import Segmentor, groups

    model, wrapped = Segmentor("vmamba_tiny_s1l8"), Segmentor("vmamba_tiny_s1l8")
    for stage in wrapped.backbone.pyramid.body.stages:
        stage.blocks = type(stage.blocks)(*map(Wrapped, stage.blocks))
    options = dict(decay_rate=0.5, custom_keys={"blocks.0.mixer": {"lr_mult": 3.0}})
    found = groups(Wrapped(wrapped), **options)
    assert any("blocks.0._fsdp_wrapped_module.mixer" in name for name in found)
    assert {name.replace("_fsdp_wrapped_module.", ""): group for name, group in found.items()} == groups(
        model, **options
    )


def test_demonstration_of_fsdp():
    """Every name in it is known to mmengine, and what it shards is the network of the other demonstration."""
    from mmengine.registry import MODEL_WRAPPERS, RUNNERS, STRATEGIES

    cfg = Config.fromfile(ROOT / "configs/demo/upernet_vmamba_tiny_s1l8_shapes_fsdp.py")
    assert RUNNERS.get(cfg.runner_type) and STRATEGIES.get(cfg.strategy.type)
    assert MODEL_WRAPPERS.get(cfg.strategy.model_wrapper.type) is BlockwiseFSDP and cfg.optim_wrapper.clip_grad is None
    other = Config.fromfile(ROOT / "configs/demo/upernet_vmamba_tiny_s1l8_shapes.py")
    assert cfg.model == other.model and cfg.train_dataloader.batch_size * 2 == other.train_dataloader.batch_size

"""Classification by vmamba train: the published recipe on a made-up folder, resumed, tested, averaged."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from PIL import Image
from torch import nn

import vmamba
import vmamba.mm
from tests.mm_models import classification_batch
from tests.timm_zoo import shrunk
from vmamba.checkpoint import read
from vmamba.errors import UserError
from vmamba.mm.accuracy import TopAccuracy
from vmamba.mm.average import VMambaEMAHook
from vmamba.tools.cli import main

ROOT = Path(__file__).parents[1]
NAME = "vmamba_tiny_s1l8"
PUBLISHED = ROOT / f"configs/classification/classifier_{NAME}_imagenet_300e.py"
COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 60), "red": (210, 30, 40)}
SIDE, BATCH, EPOCHS = 32, 6, 2
SMALL = f"""\
_base_ = [{str(PUBLISHED)!r}]
model = dict(num_classes=3, **{{**{shrunk(NAME)!r}, "drop_path_rate": 0.0}})
small = dict(num_workers=0, persistent_workers=False, pin_memory=False, batch_size={BATCH})
train_dataloader = dict(dataset=dict(transform=dict(input_size={SIDE})), **small)
val_dataloader = dict(dataset=dict(transform=dict(input_size={SIDE})), **small)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs={EPOCHS})
env_cfg = dict(cudnn_benchmark=False)
randomness = dict(seed=0, deterministic=True)
"""
PLAIN = """
model = dict(mixup=None)
train_dataloader = dict(dataset=dict(transform=dict(
    no_aug=True, auto_augment=None, re_prob=0.0, hflip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0)
)))
param_scheduler = None
optim_wrapper = dict(optimizer=dict(lr=3e-3))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """data/imagenet of 3 classes, 4 images of each for training, 3 for validation; it lies in the current folder."""
    monkeypatch.chdir(tmp_path)
    for split, number in (("train", 4), ("val", 3)):
        for name, colour in COLOURS.items():
            place = Path("data/imagenet", split, name)
            place.mkdir(parents=True)
            for i in range(number):
                shade = tuple(min(255, value + 7 * i) for value in colour)
                Image.new("RGB", (37 + 5 * i, 43), shade).save(place / f"{i}.JPEG")
    return tmp_path


def config(name: str, *parts: str) -> str:
    """A file with a small network in the published recipe, and changes to it."""
    path = Path(f"{name}.py")
    for i, part in enumerate(parts):  # a part at a time: each overrides those before it
        path.write_text(part if i == 0 else f"_base_ = [{str(path.with_suffix('.base.py'))!r}]\n{part}")
        if i + 1 < len(parts):
            path.rename(path.with_suffix(".base.py"))
    return str(path)


def saved(folder: str, epoch: int) -> dict:
    return dict(read(Path(folder, f"epoch_{epoch}.pth")))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_published_recipe(folder):
    """Mixup, CutMix, RandAugment, erasing, clipping, the average: training runs, is validated, and is resumed."""
    path = config("recipe", SMALL)
    assert main(["train", path]) == 0
    first, last = saved("work_dirs/recipe", 1), saved("work_dirs/recipe", EPOCHS)
    steps, key = EPOCHS * 12 // BATCH, "network.head.fc.weight"
    assert last["ema_state_dict"]["steps"] == steps and list(Path("work_dirs/recipe").glob("best_accuracy_top1_*.pth"))
    averaged, raw = last["state_dict"][key], last["ema_state_dict"][f"module.{key}"]
    assert averaged.shape == (3, 128) and not torch.equal(averaged, raw)
    assert not torch.equal(averaged, first["state_dict"][key])
    assert main(["train", path, "--resume", "--cfg-options", "train_cfg.max_epochs=3"]) == 0
    assert saved("work_dirs/recipe", 3)["ema_state_dict"]["steps"] == steps * 3 // 2


def test_learns_resumes_and_is_tested(folder, capsys):
    """Three colours are told apart; a run that stops after an epoch and is resumed ends where an unbroken one does."""
    path = config("plain", SMALL, PLAIN)
    epochs = ["--cfg-options", "train_cfg.max_epochs=4", "custom_hooks.0.momentum=0.9"]
    assert main(["train", path, *epochs]) == 0
    whole = saved("work_dirs/plain", 4)
    assert main(["train", path, "--work-dir", "short", *epochs[:1], "train_cfg.max_epochs=1", epochs[2]]) == 0
    assert main(["train", path, "--work-dir", "short", "--resume", *epochs]) == 0
    resumed = saved("short", 4)
    assert same(resumed["state_dict"], whole["state_dict"])
    assert same(resumed["ema_state_dict"], whole["ema_state_dict"])
    capsys.readouterr()
    assert main(["test", path, "short/epoch_4.pth", "--out", "scores.pkl"]) == 0
    assert "accuracy/top1: 100.0000  accuracy/top5: 100.0000" in capsys.readouterr().out


def test_official_checkpoint(folder, capsys, monkeypatch):
    """vmamba test takes a file of the original code with its arguments, and refuses another network's."""
    path = config("plain", SMALL, PLAIN)
    model = timm.create_model(NAME, num_classes=3, **shrunk(NAME))
    state = dict(model.state_dict())
    head = {"classifier.head.weight": state.pop("head.fc.weight"), "classifier.head.bias": state.pop("head.fc.bias")}
    arguments = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    for module in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    vars(sys.modules["yacs.config"])["CfgNode"] = arguments
    torch.save({"model": {**state, **head}, "epoch": 7, "config": arguments(lr=0.1)}, "official.pth")
    monkeypatch.setitem(sys.modules, "yacs.config", None)
    assert main(["test", path, "official.pth"]) == 0
    printed = capsys.readouterr()
    assert "accuracy/top1" in printed.out + printed.err  # in the latter after tests that took mmengine's log with them
    torch.save({"model": {key: value for key, value in state.items() if "stages.3" not in key}}, "other.pth")
    assert main(["test", path, "other.pth"]) == 2
    assert (
        "vmamba: error: the checkpoint is not of this classifier; native layout: 90 tensors loaded"
        in capsys.readouterr().err
    )


def classifier(name=NAME, **options) -> nn.Module:
    settings = shrunk(name) if name in vmamba.list_models() else {}
    return MODELS.build({"type": "VMambaClassifier", "variant": name, "num_classes": 5, **settings, **options})


@pytest.mark.parametrize("name", [NAME, "vim_tiny_patch16_224", "vcmamba_s", "mobilemamba_t2", "test_resnet"])
@pytest.mark.parametrize("mixup", [None, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}])
def test_a_step_of_any_network(name, mixup):
    """Every parameter learns: also the second classifier of networks made for distillation, also timm's own."""
    torch.manual_seed(0)
    model = classifier(name, label_smoothing=0.1, mixup=mixup).train()
    side = 224 if name.startswith("vim") else 64
    loss = model(*classification_batch((side, side), (side, side)), mode="loss")["loss"]
    loss.backward()
    assert loss > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_loss_is_that_of_smoothed_targets():
    model = classifier(label_smoothing=0.1, drop_path_rate=0.0)
    images, labels = classification_batch((33, 47), (33, 47))
    target = torch.full((2, 5), 0.1 / 5)
    target[range(2), labels] += 0.9
    expected = -(target * model(images).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model(images, labels, mode="loss")["loss"], expected)
    predictions = model(images, labels, mode="predict")
    assert [int(p["label"]) for p in predictions] == [0, 1] and predictions[0]["scores"].shape == (5,)


def test_half_precision():
    """Under autocast the loss is whole and its gradients are finite."""
    torch.manual_seed(0)
    model = classifier(mixup={"mixup_alpha": 0.8})
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*classification_batch((32, 32), (32, 32)), mode="loss")["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.network.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(folder, dtype):
    assert main(["train", config("amp", SMALL, PLAIN), "--amp", dtype]) == 0
    assert all(t.isfinite().all() for t in saved("work_dirs/amp", EPOCHS)["state_dict"].values())


def test_pretrained(tmp_path):
    """Weights of a file outlast mmengine's initialisation; a classifier of another width starts anew."""
    torch.manual_seed(0)
    source = timm.create_model(NAME, num_classes=7, **shrunk(NAME))
    torch.save({"model": source.state_dict()}, tmp_path / "seven.pth")
    model = classifier(pretrained=str(tmp_path / "seven.pth"))
    model.init_weights()
    wanted, state = source.state_dict(), model.network.state_dict()
    differ = {key for key in state if state[key].shape != wanted[key].shape or not torch.equal(state[key], wanted[key])}
    assert differ == {"head.fc.weight", "head.fc.bias"}
    with pytest.raises(ValueError, match=r"seven\.pth is not of this network"):
        classifier("vim_tiny_patch16_224", pretrained=str(tmp_path / "seven.pth"))
    other = timm.create_model("test_resnet", num_classes=5)
    torch.save(other.state_dict(), tmp_path / "resnet.pth")
    loaded = classifier("test_resnet", pretrained=str(tmp_path / "resnet.pth"))
    assert same(dict(loaded.network.state_dict()), dict(other.state_dict()))


def test_accuracy():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.4, 0.1], [0.3, 0.3, 0.4]])
    metric = TopAccuracy(topk=(1, 2))
    labels = torch.tensor([1, 2, 0])
    metric.process(None, [{"scores": y, "label": label} for y, label in zip(scores, labels, strict=True)])
    found = metric.evaluate(3)
    assert found == pytest.approx({"accuracy/top1": 100 / 3, "accuracy/top2": 200 / 3})
    with pytest.raises(ValueError, match=r"topk needs numbers of 1 or more, got \(0,\)"):
        TopAccuracy(topk=(0,))


def test_average_of_a_bare_file():
    """Tensors under ``model``, or without an envelope, are found by the average too."""
    hook = VMambaEMAHook(momentum=0.1)
    runner = type("Runner", (), {"model": nn.Linear(2, 2), "_resume": False})()
    hook.before_run(runner)
    for wrap in (lambda state: {"model": state}, dict, lambda state: {"state_dict": state}):
        state = {"weight": torch.rand(2, 2), "bias": torch.rand(2)}
        hook.after_load_checkpoint(runner, wrap(state))
        assert same(dict(hook.ema_model.module.state_dict()), state)


def test_data(folder):
    """Published transforms: sizes, classes in order, and one more reader of timm."""
    cfg = Config.fromfile(ROOT / "configs/_base_/datasets/imagenet.py")
    for loader, number in ((cfg.train_dataloader, 12), (cfg.test_dataloader, 9)):
        dataset = DATASETS.build(loader.dataset)
        image, label = dataset[len(dataset) - 1]
        assert len(dataset) == number and image.shape == (3, 224, 224) and label == 2
        assert dataset.metainfo["classes"] == ("blue", "green", "red")
    train = str(DATASETS.build(cfg.train_dataloader.dataset).transform)
    assert all(word in train for word in ("RandAugment", "RandomErasing(p=0.25", "bicubic", "RandomHorizontalFlip"))
    assert "Resize(size=256" in str(DATASETS.build(cfg.test_dataloader.dataset).transform)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: classifier("vmamba_tinny"), "unknown model 'vmamba_tinny'; did you mean"),
        (lambda: classifier()(torch.zeros(1, 3, 32, 32), mode="loss"), "a classifier needs labels; got mode 'loss'"),
        (lambda: classifier()(*classification_batch((32, 32)), mode="x"), "a mode among tensor, loss and predict"),
        (lambda: images(root="nowhere"), "no folder at nowhere; put ImageNet there"),
        (lambda: images(split="test"), "a folder has the splits train and validation, got 'test'"),
        (lambda: images(root="data"), "data has no folder train, with a folder of images for each class"),
        (lambda: images(root="empty"), "empty has no images for train"),
    ],
)
def test_errors(build, message, folder):
    Path("empty/train/class").mkdir(parents=True)
    with pytest.raises((ValueError, UserError), match=message):
        build()


def images(**options):
    where = {"root": "data/imagenet", "split": "train", "transform": {"input_size": 8}, **options}
    return DATASETS.build({"type": "TimmDataset", **where})


def test_without_toolboxes(folder):
    """Classification needs mmengine alone."""
    words = ["train", config("alone", SMALL, PLAIN), "--cfg-options", "train_cfg.max_epochs=1"]
    program = f"""\
import sys
sys.modules.update(dict.fromkeys({["mmcv", "mmdet", "mmseg", "mmpretrain"]}))
from vmamba.tools.cli import main
sys.exit(main({words}))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert Path("work_dirs/alone/epoch_1.pth").is_file()

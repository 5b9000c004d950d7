"""Loading in processes, and what ends a training: shared memory, dead processes, a loss that is no number."""

import os
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.medseg_nnunet import FLAT, SHORT, dataset
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
pytest.importorskip("lightning")
from vmamba.errors import UserError
from vmamba.medical import fold_module, loading
from vmamba.medical.busy import covered
from vmamba.medical.networks import build
from vmamba.medical.patches import Draws, Epoch
from vmamba.medical.plan import Configuration
from vmamba.medical.train import Interrupted, fit
from vmamba.medical.watch import Watch

QUIET = "--no-progress"
MIB = 1 << 20


class Items(torch.utils.data.Dataset):
    """A quarter of a MiB each; the one of index ``bad`` kills its process by the signal."""

    def __init__(self, bad=None, number=signal.SIGKILL):
        self.bad, self.number = bad, number

    def __getitem__(self, key):
        if key[1] == self.bad:
            os.kill(os.getpid(), self.number)
        return torch.zeros(MIB // 16), 3, torch.zeros(0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    dataset(folder)
    assert run("plan", "-d", 7, "--root", folder, QUIET) == 0
    assert run("preprocess", "-d", 7, "-c", "2d", "--root", folder, QUIET) == 0
    return folder


@pytest.mark.parametrize(
    ("room", "expected"), [(100, (4, 2)), (7, (4, 1)), (4, (4, 1)), (2, (2, 1)), (0, (0, 1))], ids=str
)
def test_as_many_as_fit(room, expected):
    assert loading.fitting(4, MIB, room * MIB) == expected


def test_little_shared_memory_is_told(monkeypatch, capsys):
    draws = Draws(4, 3, 0)
    assert loading.batch_bytes(Items(), Epoch(draws, (0, 1))) == MIB
    monkeypatch.setattr(loading, "free_shared", lambda: 4 * MIB)
    found = loading.loader(Items(), Epoch(draws, (0, 1)), 3)
    assert isinstance(found, DataLoader) and found.num_workers == 2 and found.prefetch_factor == 1
    assert "4 MiB free, a batch takes 1.0: 2 of 3 processes load" in capsys.readouterr().out
    assert [len(batch[0]) for batch in found] == [4, 4, 4]
    monkeypatch.setattr(loading, "free_shared", lambda: MIB)
    assert loading.loader(Items(), Epoch(draws, (0, 1)), 3, ranks=2).num_workers == 0
    monkeypatch.setattr(loading, "free_shared", lambda: None)
    assert loading.loader(Items(), Epoch(draws, (0, 1)), 3).num_workers == 3


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "main memory"), (signal.SIGBUS, "--shm-size=8g")])
def test_a_process_that_dies(number, words):
    batches = loading.loader(Items(5, number), Epoch(Draws(4, 3, 0), (0, 1)), 1)
    trainer = types.SimpleNamespace(fit=lambda *_, **__: list(batches), current_epoch=0)
    with pytest.raises(UserError, match=words):
        fit(trainer, None, None, None)  # pyright: ignore[reportArgumentType]


def test_other_ends_of_loading():
    def failing(text):
        def fails(*_, **__):
            raise RuntimeError(text)

        return types.SimpleNamespace(fit=fails, current_epoch=2)

    with pytest.raises(Interrupted, match="terminated in epoch 3"):
        fit(failing("DataLoader worker (pid 1) is killed by signal: Terminated."), None, None, None)  # pyright: ignore
    with pytest.raises(RuntimeError, match="something else"):
        fit(failing("something else"), None, None, None)  # pyright: ignore
    inner = "Caught RuntimeError in DataLoader worker process 0.\nunable to write to file </torch_1_2_3>: No space left"
    assert "shared memory is full" in str(loading.meaning(RuntimeError(inner)))
    assert "raise the limit" in str(
        loading.meaning(RuntimeError("Too many open files. Communication with the workers is no longer possible."))
    )
    assert loading.meaning(RuntimeError("DataLoader worker process 0: bad data")) is None


def test_a_loss_that_is_no_number_ends_the_training(root, monkeypatch):
    """Told with its step, before any weights that came of it are kept."""
    original = fold_module.deep_loss
    seen = []

    def diverges(loss, maps, label):
        seen.append(1)
        return original(loss, maps, label) * (float("nan") if len(seen) == 2 else 1)

    monkeypatch.setattr(fold_module, "deep_loss", diverges)
    words = ["train", 7, "2d", 0, "--root", root, *FLAT, *SHORT]
    lr = float(SHORT[SHORT.index("--lr") + 1])
    rejected(lambda: run(*words), "the loss is nan at step 2 of epoch 1", f"--lr {lr / 10:g} (now {lr:g})")
    folder = next((root / "nnUNet_results").rglob("fold_0"))
    assert not list(folder.glob("checkpoint_*"))


def test_watch_advises_what_is_left():
    assert Watch(1e-3, "bf16-mixed").advice == "try --lr 0.0001 (now 0.001) or --precision 32-true (now bf16-mixed)"
    assert Watch(1e-3, "32-true").advice == "try --lr 0.0001 (now 0.001)"


def test_covered():
    assert covered([(0, 4), (2, 6), (8, 10), (3, 5)]) == pytest.approx(0.8)
    assert covered([]) is None and covered([(1, 1)]) is None


class Level(nn.Module):
    """What stands in for nnU-Net's encoder and decoder."""

    def __init__(self, *layers):
        super().__init__()
        self.seg_layers, self.deep_supervision = nn.ModuleList(layers), False

    def forward(self, x):
        maps = [layer(x) for layer in self.seg_layers]
        return maps if self.deep_supervision else maps[0]


GIVEN = []


def stand_in(channels, stages, features, conv, kernels, strides, convolutions, outputs, *rest, **options):
    """Takes what PlainConvUNet of dynamic_network_architectures takes."""
    body = nn.Module()
    body.encoder, body.decoder = nn.Identity(), Level(*(conv(channels, outputs, 1) for _ in range(stages - 1)))
    GIVEN[:] = stages, list(features), list(convolutions), list(rest[0]), options
    return body


def test_nnunets_own_network(root, monkeypatch):
    """Trained and predicted under the name of nnU-Net's trainer; the package itself is not needed for the way there."""
    plan = Configuration(
        "2d", "x", (32, 32), 2, (1.0, 1.0), (), (), True, (8, 16), ((3, 3),) * 2, ((1, 1), (2, 2)), ((2, 2), (2,))
    )
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures", None)
    rejected(lambda: build("nnUNetTrainer", plan, 1, 3, {}), "dynamic-network-architectures", "--no-deps")
    package = types.ModuleType("dynamic_network_architectures.architectures")
    package.unet = types.SimpleNamespace(PlainConvUNet=stand_in)  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("dynamic_network_architectures", package.__name__):
        monkeypatch.setitem(sys.modules, name, package)
    network = build("plain_conv_unet", plan, 1, 3, {"features": (4, 8)})
    assert network.stride == (2, 2) and network.axes == 2 and not network.deep_supervision
    assert GIVEN[:4] == [2, [4, 8], [2, 2], [2]] and GIVEN[4]["norm_op"] is nn.InstanceNorm2d
    rejected(lambda: build("nnUNetTrainer", plan, 1, 3, {"dims": 3}), "--set dims", "features")
    words = ["--root", root, "-tr", "nnUNetTrainer"]
    assert run("train", 7, "2d", 0, *words, *SHORT, QUIET) == 0
    images = next(Path(root, "nnUNet_raw").rglob("imagesTr"))
    out = root / "predicted"
    assert run("predict", "-i", images, "-o", out, "-d", 7, "-c", "2d", "-f", 0, *words, "--disable_tta", QUIET) == 0
    assert list(out.glob("*.nii.gz"))

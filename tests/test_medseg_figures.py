"""Losses, counts and conventions of medseg against the figures of the original implementations."""

import json
import math

import numpy as np
import pytest
import torch

from tests import goldens
from tests.medseg_data import volumes
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
from vmamba.medical.conventions import hd95, pooled, volume_scores
from vmamba.medical.evaluate import scores, summarise
from vmamba.medical.inference import infer
from vmamba.medical.labelset import classes
from vmamba.medical.recipe_losses import LOSSES
from vmamba.medical.transforms import Augment, pad_to

CASES = goldens.load("medical_losses_metrics")["cases"]


@pytest.mark.parametrize(("kind", "name"), [("vmunet_ce_dice", "CE + Dice"), ("msvm_dice_ce", "0.4 CE + 0.6 Dice")])
def test_losses_are_the_papers(kind, name):
    case = next(c for c in CASES if c["kind"] == kind)
    shape, seed = case["shape"], case["seed"]
    x = torch.from_numpy(2 * goldens.make_input(shape, seed)).requires_grad_()
    y = torch.from_numpy(goldens.make_input(shape, seed + 1).argmax(1, keepdims=True))
    loss = LOSSES[name]()(x, y)
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"]["value"], abs=2e-8)
    assert goldens.compare(x.grad, case["outputs"]["grad"]) < 1e-6


def test_loss_of_one_output_is_vmunets():
    case = next(c for c in CASES if c["kind"] == "vmunet_bce_dice")
    shape, seed = case["shape"], case["seed"]
    x = torch.from_numpy(2 * goldens.make_input(shape, seed)).requires_grad_()
    y = torch.from_numpy(goldens.make_input(shape, seed + 1) > 0.2).long()
    loss = LOSSES["BCE + Dice"]()(x, y)
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"]["value"], abs=1e-8)
    p = x.sigmoid().detach()
    assert goldens.compare(x.grad / (p * (1 - p)), case["outputs"]["grad"]) < 1e-6  # the figure is of probabilities


@pytest.mark.parametrize("case", [c for c in CASES if c["kind"] == "nnunet_metrics"], ids=lambda c: str(c["shape"]))
def test_scores_are_nnunets(case):
    shape, seed = case["shape"], case["seed"]
    one, two = (goldens.make_input([1, 1, *shape], s)[0, 0] for s in (seed, seed + 1))
    predicted, truth = (one > 0.3).astype(int), ((one > 0.15) & ~(two > 0.9)).astype(int)
    got = scores(truth, predicted, classes(1))["1"]
    for name, summary in case["outputs"].items():
        assert got[name] == pytest.approx(summary["value"], abs=1e-12), name
    assert (got["n_pred"], got["n_ref"]) == (predicted.sum(), truth.sum())


@pytest.mark.parametrize("case", [c for c in CASES if c["kind"] == "medpy"], ids=lambda c: str(c["shape"]))
def test_hd95_is_medpys(case):
    truth, predicted = masks_of(case)
    assert hd95(truth, predicted, case["spacing"]) == pytest.approx(case["outputs"]["hd95"]["value"], abs=1e-12)
    dice = volume_scores(truth, predicted)["Dice"]
    assert dice == pytest.approx(case["outputs"]["dc"]["value"], abs=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c["kind"] == "isic_metrics"], ids=lambda c: str(c["shape"]))
def test_pooled_figures_are_vmunets(case):
    truth, predicted = masks_of(case)
    got, names = (
        pooled([(truth[::2], predicted[::2]), (truth[1::2], predicted[1::2])]),
        {"f1_or_dsc": "DSC", "miou": "mIoU"},
    )
    for name, summary in case["outputs"].items():
        assert got[names.get(name, name)] == pytest.approx(summary["value"], abs=1e-12), name


def test_empty_masks_follow_the_papers():
    case = next(c for c in CASES if c["kind"] == "synapse_empty")
    full, empty = np.ones((2, 3, 4), bool), np.zeros((2, 3, 4), bool)
    got = [list(volume_scores(t, p).values()) for t, p in ((empty, full), (full, empty), (empty, empty))]
    assert got == case["outputs"]["table"]["value"]


def masks_of(case):
    """(truth, prediction) as the golden says."""
    shape, seed = case["shape"], case["seed"]
    one, two = (goldens.make_input([1, 1, *shape], s)[0, 0] for s in (seed, seed + 1))
    return (one > 0.15) & ~(two > 0.9), one > 0.3


@pytest.mark.parametrize(("name", "wanted"), [("isic", "mIoU"), ("synapse", "HD95"), ("acdc", "HD95")])
def test_evaluation_by_name(tmp_path, capsys, name, wanted):
    volumes(tmp_path / "d")
    words = ["evaluate", tmp_path / "d/labels", tmp_path / "d/labels", "--convention", name, "-o", tmp_path / "s.json"]
    assert run(*words, "--no-progress") == 0
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["convention"] == name and wanted in capsys.readouterr().out and "conventions" in summary
    perfect = summary["pooled"]["DSC"] if name == "isic" else summary["foreground_mean"]["Dice"]
    assert perfect == 1
    rejected(lambda: run(*words), tmp_path / "s.json", "exists")
    rejected(lambda: run(*words[:3], "--convention", "mine"), "mine", "isic, synapse, acdc")


def test_empty_classes_follow_nnunet():
    empty, full = np.zeros((1, 4, 4), int), np.ones((1, 4, 4), int)
    pairs = (empty, empty), (full, empty), (full, full)
    both, missed, found = (scores(*pair, classes(1)) for pair in pairs)
    assert math.isnan(both["1"]["Dice"]) and math.isnan(both["1"]["IoU"])
    assert missed["1"]["Dice"] == 0 and found["1"]["Dice"] == 1
    assert scores(empty, full, classes(1))["1"]["Dice"] == 0
    cases = [{"metrics": m} for m in (both, missed, found)]
    assert summarise(cases)["foreground_mean"]["Dice"] == 0.5


def test_padding_takes_the_smallest_value_and_is_cut_out_again():
    x = torch.randn(2, 3, 5, 7)
    padded, (rows, columns) = pad_to(x, (32, 9))
    assert padded.shape == (2, 3, 32, 9)
    torch.testing.assert_close(padded[..., rows, columns], x)
    assert torch.allclose(padded[1, 2, 0, 0], x[1, 2].min())
    assert pad_to(torch.ones(1, 3, 3), (4, 4), value=0)[0].sum() == 9


@pytest.mark.parametrize("size", [(20, 33), (32, 64), (70, 41)])
def test_windows_and_padding_leave_a_pointwise_network_alone(size):
    def network(x):
        assert x.shape[-2] % 32 == 0 and x.shape[-1] % 32 == 0
        return torch.cat([x, -2 * x], 1)

    x = torch.randn(3, 1, *size)
    torch.testing.assert_close(infer(network, x, [32, 32], 2), network_free(x), rtol=1e-5, atol=1e-5)


def network_free(x):
    return torch.cat([x, -2 * x], 1)


def test_augmentation_depends_on_the_seed_alone():
    augment = Augment((32, 32), "standard")
    image, label = torch.rand(1, 40, 28), torch.randint(0, 3, (40, 28))
    one, two = augment(image, label, 5), augment(image, label, 6)
    again = augment(image, label, 5)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], two[0])
    assert one[0].shape == (1, 32, 32) and one[1].shape == (32, 32) and one[1].dtype == torch.long
    assert set(one[1].unique().tolist()) <= {0, 1, 2}


def test_augmentation_moves_image_and_label_together():
    label = torch.zeros(64, 64, dtype=torch.long)
    label[10:30, 20:50] = 1
    augment = Augment((64, 64), "standard")
    for seed in range(12):
        image, moved = augment(10.0 * label[None], label, seed)
        inside, outside = image[0][moved == 1].median(), image[0][moved == 0].median()
        assert inside > outside + 5, seed

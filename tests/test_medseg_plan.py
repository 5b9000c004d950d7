"""Plans, splits, preprocessing and losses of medseg against nnU-Net 2.8.1's, and label sets."""

import itertools
import json

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from tests import goldens
from tests.medseg_nnunet import LABELS, REGIONS, dataset, write_description
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
from vmamba.medical.export import file_probabilities
from vmamba.medical.fingerprint import fingerprint
from vmamba.medical.folds import fold_cases, make_splits
from vmamba.medical.labelset import label_set
from vmamba.medical.losses import LabelLoss, deep_loss, level_weights
from vmamba.medical.model_folder import Trained
from vmamba.medical.patches import AUGMENTATIONS, Draws, Patches, cut
from vmamba.medical.plan import configuration, make_plans
from vmamba.medical.postprocess import decide, keep_largest
from vmamba.medical.preprocess import preprocess, preprocess_case, stored_cases
from vmamba.medical.raw import Places, find_dataset, read_dataset
from vmamba.medical.resample import coarse_axis, resample, resample_labels
from vmamba.medical.topology import topology
from vmamba.medical.volume import read_case
from vmamba.medical.window import Window, mirrors, volume_logits

CASES = goldens.load("medical_losses_metrics")["cases"]
THREE = {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}
# spacing, size, labels, cases: what nnUNetv2_plan_experiment (2.8.1) makes of them for 8 and 24 GB
PLANNED = [
    ((1, 1, 1), (150, 512, 512), 9, 30, "160x512:39 192x64x192:2+ 192x64x192:2", "160x512:116 256x112x256:2"),
    ((5, 0.78, 0.78), (100, 500, 512), 14, 40, "512x512:12 48x192x192:2+ 80x128x160:2", "512x512:36 80x256x256:2"),
    ((10, 1.5, 1.5), (9, 250, 216), 4, 100, "256x224:47 10x256x224:5", "256x224:47 10x256x224:5"),
    ((1, 1, 1), (155, 240, 240), 4, 480, "256x256:49 96x160x160:2", "256x256:147 128x224x224:2"),
    ((2.5, 0.8, 0.8), (120, 400, 400), 3, 20, "448x448:16 56x192x192:2+ 80x160x192:2", "448x448:48 80x256x256:2"),
    ((0.5, 0.5, 0.5), (200, 200, 200), 2, 50, "224x192:76 128x128x128:2", "224x192:227 192x192x192:2"),
    ((999, 1, 1), (1, 512, 640), 3, 200, "512x768:8", "512x768:8"),
    ((3, 1, 1), (48, 320, 320), 14, 60, "320x320:30 32x224x256:2", "320x320:91 48x320x320:2"),
    ((1.2, 1.2, 6), (256, 256, 20), 4, 25, "320x320:19 24x256x256:2", "320x320:19 24x320x320:2"),
]


@pytest.mark.parametrize("case", [c for c in CASES if c["kind"] == "topology"], ids=lambda c: str(c["patch"]))
def test_topology_is_nnunets(case):
    plan, got = case["outputs"]["plan"]["value"], topology(case["spacing"], case["patch"])
    assert [list(s) for s in got.strides] == plan["strides"] and [list(k) for k in got.kernels] == plan["kernel_sizes"]
    assert list(got.patch) == plan["patch_size"] and list(got.divisor) == plan["divisible_by"]


@pytest.mark.parametrize("number", range(len(PLANNED)))
def test_plans_are_nnunets(tmp_path, number):
    spacing, size, count, cases, *expected = PLANNED[number]
    names = {"background": 0, **{f"l{j}": j for j in range(1, count)}}
    write_description(tmp_path, names, cases)
    rng = np.random.default_rng(number)
    spread = spacing * rng.uniform(0.8, 1.3, (cases, 3)) if spacing[0] < 900 else np.tile(spacing, (cases, 1))
    grow = [rng.uniform(0.8, 1.2, 3) for _ in range(cases)]
    found = {
        "spacings": spread.tolist(),
        "shapes_after_crop": [[int(s * u) if s > 1 else 1 for s, u in zip(size, us, strict=True)] for us in grow],
        "median_relative_size_after_cropping": 0.9,
        "foreground_intensity_properties_per_channel": {},
    }
    for memory, text in zip((8, 24), expected, strict=True):
        plans = make_plans(read_dataset(tmp_path), found, "nnUNetPlans", memory)["configurations"]
        known = [plans[key] for key in ("2d", "3d_fullres", "3d_lowres") if key in plans]
        shown = [f"{'x'.join(map(str, c['patch_size']))}:{c['batch_size']}" for c in known]
        assert (
            " ".join(
                s + "+" * (c is plans.get("3d_fullres") and c["batch_dice"]) for s, c in zip(shown, known, strict=True)
            )
            == text
        )


def test_either_form_of_plans_is_read(tmp_path):
    root = dataset(tmp_path).parent.parent
    assert run("plan", "-d", 7, "--root", root, "--no-progress") == 0
    path = root / "nnUNet_preprocessed/Dataset007_Bälle/nnUNetPlans.json"
    plans = json.loads(path.read_text())
    new = configuration(plans, "3d_fullres", "plans")
    c = plans["configurations"]["3d_fullres"]
    a = c.pop("architecture")["arch_kwargs"]
    c |= {"pool_op_kernel_sizes": a["strides"], "conv_kernel_sizes": a["kernel_sizes"]}
    c |= {"UNet_base_num_features": 32, "unet_max_num_features": 320}
    c |= {"n_conv_per_stage_encoder": a["n_conv_per_stage"], "n_conv_per_stage_decoder": a["n_conv_per_stage_decoder"]}
    assert configuration(plans, "3d_fullres", "plans") == new
    plans["configurations"]["child"] = {"inherits_from": "3d_fullres", "batch_size": 77}
    assert configuration(plans, "child", "plans").batch == 77
    plans["configurations"]["cascade"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    rejected(lambda: configuration(plans, "cascade", "plans"), "cascade", "3d_fullres")
    rejected(lambda: configuration(plans, "4d", "plans"), "4d", "2d, 3d_fullres")
    del c["conv_kernel_sizes"]
    rejected(lambda: configuration(plans, "3d_fullres", "plans"), "conv_kernel_sizes")
    rejected(lambda: run("plan", "-d", 7, "--root", root, "--no-progress"), path, "exists", "--overwrite")


def test_splits_are_nnunets_and_a_users_are_respected(tmp_path):
    names = [f"case_{i:02d}" for i in range(12)]
    splits = make_splits(names)
    assert sorted(itertools.chain(*(s["val"] for s in splits))) == names
    assert splits[0]["val"] == ["case_00", "case_03", "case_08"]  # as nnUNetv2_train writes them
    path = tmp_path / "splits_final.json"
    assert (
        fold_cases(path, names, "0") == (splits[0]["train"], splits[0]["val"])
        and json.loads(path.read_text()) == splits
    )
    path.write_text(json.dumps([{"train": names[:3], "val": names[3:4]}]))
    assert fold_cases(path, names, "0") == (names[:3], names[3:4])
    train, val = fold_cases(path, names, "4")
    assert len(train) == 9 and sorted(train + val) == names and fold_cases(path, names, "4") == (train, val)
    assert fold_cases(path, names, "all") == (names, names)
    rejected(lambda: fold_cases(path, names[:2], "0"), path, "case_02")
    rejected(lambda: fold_cases(path, names, "-1"), "-1", "all")
    path.write_text("{")
    rejected(lambda: fold_cases(path, names, "0"), path, "train")
    rejected(lambda: fold_cases(tmp_path / "none.json", names[:3], "0"), "3 case(s)", "all")


def test_label_sets():
    plain = label_set({"labels": LABELS}, "d")
    assert plain.outputs == 3 and plain.keys == ["1", "2"] and plain.values == [0, 1, 2]
    regions = label_set({"labels": REGIONS, "regions_class_order": [1, 2]}, "d")
    assert regions.outputs == 2 and regions.keys == ["(1, 2)", "2"] and regions.values == [0, 1, 2, 3]
    maps = np.array([[0.9, 0.9, 0.1, 0.1], [0.1, 0.6, 0.6, 0.1]])
    assert regions.label_map(maps).tolist() == [1, 2, 2, 0]
    assert regions.regions(torch.tensor([[[0, 1, 2]]])).tolist() == [[[0, 1, 1], [0, 0, 1]]]
    rejected(lambda: label_set({"labels": REGIONS}, "d.json"), "d.json", "regions_class_order", "2 regions")
    rejected(lambda: label_set({"labels": {"background": 0, "a": 2}}, "d.json"), "d.json", "[2]", "consecutive")
    rejected(lambda: label_set({"labels": {"a": 1}}, "d.json"), "background")
    rejected(lambda: label_set({"labels": {"background": 0, "a": 1, "ignore": 5}}, "d.json"), "5", "expected 2")


def golden(kind, **match):
    return next(c for c in CASES if c["kind"] == kind and all(c[k] == v for k, v in match.items()))


@pytest.mark.parametrize("seed", [2030, 2031])
def test_class_loss_is_nnunets(seed):
    case = golden("nnunet_dc_ce", seed=seed)
    x = torch.from_numpy(2 * goldens.make_input(case["shape"], seed)).requires_grad_()
    y = torch.from_numpy(goldens.make_input(case["shape"], seed + 1).argmax(1, keepdims=True))
    check(LabelLoss(label_set(THREE, ""), batch_dice=seed == 2031)(x, y), x, case)


def test_ignored_voxels_count_as_nnunets():
    case = golden("nnunet_dc_ce_ignore")
    shape, seed = case["shape"], case["seed"]
    x = torch.from_numpy(2 * goldens.make_input(shape, seed)).requires_grad_()
    y = torch.from_numpy(goldens.make_input(shape, seed + 1).argmax(1, keepdims=True))
    y[torch.from_numpy(goldens.make_input([shape[0], 1, *shape[2:]], seed + 2) > 0.5)] = 4
    labels = label_set({"labels": {**THREE["labels"], "ignore": 4}}, "")
    check(LabelLoss(labels, batch_dice=True)(x, y), x, case)


def test_region_loss_is_nnunets():
    case = golden("nnunet_dc_bce")
    shape, seed = case["shape"], case["seed"]
    x = torch.from_numpy(2 * goldens.make_input(shape, seed)).requires_grad_()
    one = [shape[0], 1, *shape[2:]]
    masks = [torch.from_numpy(goldens.make_input(one, seed + 1 + i) > 0.1 * i) for i in range(4)]
    number = sum(mask.long() << i for i, mask in enumerate(masks))  # each set of regions as a label value
    targets = [[v for v in range(1, 16) if v >> i & 1] for i in range(4)]
    names = {"background": 0, **{f"r{i}": t for i, t in enumerate(targets)}}
    labels = label_set({"labels": names, "regions_class_order": [1, 2, 3, 4]}, "")
    check(LabelLoss(labels, batch_dice=False)(x, number), x, case)


def check(loss, x, case):
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"]["value"], abs=1e-8)
    assert goldens.compare(x.grad, case["outputs"]["grad"]) < 1e-6


def test_deep_supervision():
    assert level_weights(4) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0]) and level_weights(1) == [1]
    loss = LabelLoss(label_set(THREE, ""), batch_dice=False)
    y = torch.randint(0, 4, (2, 1, 16, 8))
    maps = [torch.randn(2, 4, 16 // s, 8 // s) for s in (1, 2, 4)]
    expected = 2 / 3 * loss(maps[0], y) + 1 / 3 * loss(maps[1], y[..., 1::2, 1::2])
    torch.testing.assert_close(deep_loss(loss, maps, y), expected)
    torch.testing.assert_close(deep_loss(loss, maps[0], y), loss(maps[0], y))


def test_mirrors():
    cases = {len(c["axes"]): c["outputs"]["combinations"]["value"] for c in CASES if c["kind"] == "tta"}
    for axes, combinations in cases.items():
        assert [list(m) for m in mirrors(range(axes))] == [[], *combinations]


@pytest.mark.parametrize("size", [(6, 9), (5, 7), (13, 11)])
def test_windows_and_mirrors(size):
    """A network that does not look around gives its own values; a mean over mirrors has no side."""
    x = torch.randn(2, 4, *size)
    wide = Trained(nn.Conv2d(2, 3, 1), (6, 9), (0, 1))
    with torch.no_grad():
        expected = wide.network(x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(volume_logits([wide, wide], x, Window()), expected, rtol=1e-4, atol=1e-5)
    sided = Trained(nn.Conv2d(2, 3, 3, padding=1), (6, 9), (0, 1))
    whole = torch.randn(2, 1, 6, 9)
    one, two = volume_logits([sided], whole, Window()), volume_logits([sided], whole.flip(-1), Window()).flip(-1)
    plain = volume_logits([sided], whole, Window(mirror=False))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one, plain, atol=1e-3)


def test_resampling():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 8, 9)).astype(np.float32)
    assert coarse_axis((5, 1, 1)) == 0 and coarse_axis((3, 1, 1)) is None and coarse_axis((4, 4, 1)) is None
    assert coarse_axis((1, 1, 1), (1, 1, 4)) == 2
    apart = resample(x, (10, 8, 9), 0, 3)
    assert np.array_equal(apart[:, ::2], x) and np.array_equal(apart[:, 1::2], x)
    ramp = np.broadcast_to(np.arange(8.0), (1, 4, 6, 8))
    assert resample(ramp, (4, 6, 16), None, 1)[0, 2, 3, 4:8] == pytest.approx([1.75, 2.25, 2.75, 3.25])
    label = np.repeat(rng.integers(-1, 3, (3, 4, 5)), 2, 2)
    assert np.array_equal(resample_labels(label, (3, 4, 5), None), label[:, :, ::2])


def test_a_case_comes_back_to_its_place(tmp_path):
    """Preprocessing crops, turns and resamples; the export puts a label map exactly where it was."""
    folder = dataset(tmp_path, shape=(12, 20, 18), spacing=(3.0, 1.0, 1.0))
    for path in [*folder.glob("imagesTr/*"), *folder.glob("labelsTr/*")]:
        image = nibabel.load(path)
        data = np.pad(np.asanyarray(image.dataobj), [(0, 0), (6, 8), (9, 5)])
        nibabel.save(nibabel.Nifti1Image(data, image.affine), path)
    found = read_dataset(folder)
    plans = make_plans(found, fingerprint(found, progress=False), "p")
    assert plans["transpose_forward"] == [2, 0, 1] and plans["transpose_backward"] == [1, 2, 0]
    assert plans["configurations"]["2d"]["use_mask_for_norm"] == [True]
    case = found.cases()[0]
    image, label = read_case(case, 1, found.labels)
    for name in ("2d", "3d_fullres"):
        c = configuration(plans, name, "p")
        data, small, crop = preprocess_case(image, label, plans, c)
        assert small is not None and data.shape[1:] == small.shape and crop.shape != crop.whole
        inside = data[0][small >= 0]
        assert abs(inside.mean()) < 0.1 and abs(inside.std() - 1) < 0.1
        maps = torch.nn.functional.one_hot(torch.from_numpy(small.clip(min=0)).long(), 3).movedim(-1, 0) * 20.0
        back = found.labels.label_map(file_probabilities(maps, crop, found.labels, plans, c))
        assert back.shape == label.shape and (back == label).mean() > 0.995


def test_patches(tmp_path):
    folder = dataset(tmp_path)
    found = read_dataset(folder)
    plans = make_plans(found, fingerprint(found, progress=False), "p")
    for name, patch in {"2d": (16, 24), "3d_fullres": (8, 16, 24)}.items():
        names = preprocess(
            found, plans, configuration(plans, name, "p"), tmp_path / name, overwrite=False, progress=False
        )
        for augmentation in AUGMENTATIONS:
            data = Patches(stored_cases(tmp_path / name, names), patch, Draws(3, 2, 0), augmentation, [1, 2])
            items = [data[1, i] for i in range(9)]
            again, other = data[1, 4], data[2, 4]
            assert torch.equal(items[4][0], again[0]) and not torch.equal(items[4][0], other[0])
            assert all(x.shape == (1, *patch) and y.shape == (1, *patch) for x, y in items)
            assert all(set(y.unique().tolist()) <= {-1, 0, 1, 2} for _, y in items)
            if augmentation != "standard":
                assert all((y > 0).any() for _, y in items[2::3])  # the last third is on the foreground
    rejected(lambda: stored_cases(tmp_path / "2d", ["other"]), "other", "preprocess")


def test_windows_reach_beyond_the_image():
    x = np.arange(12.0).reshape(1, 3, 4)
    assert cut(x, (-1, 2), (3, 4), 9)[0].tolist() == [[9, 9, 9, 9], [2, 3, 9, 9], [6, 7, 9, 9]]
    assert cut(x, (5, 5), (2, 2), 7)[0].tolist() == [[7, 7], [7, 7]]


def test_largest_component(tmp_path):
    label = np.zeros((3, 9, 9), int)
    label[1, 1:4, 1:4], label[1, 4, 4], label[1, 7, 7], label[2, 7, 1] = 1, 2, 1, 2
    assert keep_largest(label, (1,))[1, 7, 7] == 0 and (keep_largest(label, (1,)) == 2).sum() == 2
    both = keep_largest(label, (1, 2))
    assert both[1, 4, 4] == 2 and (both > 0).sum() == 10  # diagonals touch
    labels = label_set({"labels": LABELS}, "")
    truth = np.where(both == 2, 2, both)
    from tests.medseg_nnunet import save

    for name, data in (("t.nii.gz", truth), ("p.nii.gz", label)):
        save(tmp_path / name, data.astype(np.uint8))
    chosen = decide([(tmp_path / "t.nii.gz", tmp_path / "p.nii.gz")], labels, progress=False)
    assert chosen["steps"] == [[1, 2]] and chosen["Dice"]["after"] == {"1": 1, "2": 1}
    nothing = decide([(tmp_path / "p.nii.gz", tmp_path / "p.nii.gz")], labels, progress=False)
    assert nothing["steps"] == []


def test_places(tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    rejected(lambda: Places.find(), "nnUNet_raw is not set", "--root")
    folder = dataset(tmp_path, cases=1, test=0)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert find_dataset(Places.find(), "7").folder == folder == find_dataset(Places.find(), folder.name).folder
    rejected(lambda: find_dataset(Places.find(), "8"), "'8'", "Dataset007_Bälle")
    (tmp_path / "nnUNet_raw/Dataset007_Other").mkdir()
    rejected(lambda: find_dataset(Places.find(), "007"), "Dataset007_Bälle and Dataset007_Other", "whole name")

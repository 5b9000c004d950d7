"""NRRD and MetaImage volumes: the same data set in each format gives the same cases, and masks in its own format.

SimpleITK is optional. Where it is missing, a stand-in of the few functions that are used keeps arrays with their
geometry in files of NumPy's; ITK's order of axes, (z, y, x), is kept by both.
"""

import json
import sys
import types
from importlib.util import find_spec

import nibabel
import numpy as np
import pytest

from tests.medseg_nnunet import FLAT, SHORT, dataset
from tests.test_medseg_input import rejected, run

pytest.importorskip("monai")
pytest.importorskip("lightning")
from vmamba.medical import itk
from vmamba.medical.jobs import open_job
from vmamba.medical.preprocess import stored_cases
from vmamba.medical.raw import Places

QUIET = "--no-progress"
NAME = "Dataset007_Bälle"


class Image:
    """What SimpleITK calls an image."""

    def __init__(
        self,
        array,
        spacing=(1.0, 1.0, 1.0),
        direction=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
        origin=(0.0, 0.0, 0.0),
    ):
        self.array, self.geometry = array, [list(spacing), list(direction), list(origin)]

    def GetDimension(self):
        return self.array.ndim

    def GetSpacing(self):
        return tuple(self.geometry[0])

    def GetDirection(self):
        return tuple(self.geometry[1])

    def GetOrigin(self):
        return tuple(self.geometry[2])

    def SetSpacing(self, value):
        self.geometry[0] = value

    def SetDirection(self, value):
        self.geometry[1] = value

    def SetOrigin(self, value):
        self.geometry[2] = value


def read_image(path):
    with np.load(path, allow_pickle=False) as found:
        return Image(found["array"], found["s"], found["d"], found["o"])


def write_image(image, path, compressed):
    spacing, direction, origin = image.geometry
    with open(path, "wb") as file:
        np.savez(file, array=image.array, s=spacing, d=direction, o=origin)


STAND_IN = types.SimpleNamespace(
    ReadImage=read_image,
    WriteImage=write_image,
    GetArrayFromImage=lambda image: image.array,
    GetImageFromArray=Image,
)


@pytest.fixture
def library(monkeypatch):
    if find_spec("SimpleITK") is None:
        monkeypatch.setitem(sys.modules, "SimpleITK", STAND_IN)


def converted(root, ending):
    """The data set with all its files in another format."""
    folder = root / "nnUNet_raw" / NAME
    for path in [*folder.glob("images*/*.nii.gz"), *folder.glob("labelsTr/*.nii.gz")]:
        itk.write(path.with_name(path.name.replace(".nii.gz", ending)), nibabel.load(path))
        path.unlink()
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**about, "file_ending": ending}))
    return folder


def cases(root):
    assert run("plan", "-d", 7, "--root", root, QUIET) == 0
    assert run("preprocess", "-d", 7, "-c", "2d", "--root", root, QUIET) == 0
    job = open_job(Places.find(root), "7", "2d", "nnUNetTrainerVMUNet", "nnUNetPlans")
    return stored_cases(job.stored, [case.name for case in job.dataset.cases()])


@pytest.mark.parametrize("ending", itk.ENDINGS)
def test_a_data_set(tmp_path, library, ending):
    for name in ("plain", "other"):
        dataset(tmp_path / name)
    folder = converted(tmp_path / "other", ending)
    for one, two in zip(cases(tmp_path / "plain"), cases(tmp_path / "other"), strict=True):
        assert np.array_equal(one.data, two.data) and np.array_equal(one.label, two.label)
    if ending != itk.ENDINGS[0]:
        return
    words = ["--root", tmp_path / "other"]
    assert run("train", 7, "2d", 0, *words, *FLAT, *SHORT) == 0
    predict = ["predict", "-i", folder / "imagesTr", "-o", tmp_path / "out", "-d", 7, "-c", "2d", "-f", 0, *words]
    assert run(*predict, "-tr", "nnUNetTrainerVMUNet", "--disable_tta", "-device", "cpu", QUIET) == 0
    masks = sorted((tmp_path / "out").glob(f"*{ending}"))
    assert masks and not list((tmp_path / "out").glob("*.nii.gz"))
    truth = itk.read(folder / "labelsTr" / masks[0].name)
    mask = itk.read(masks[0])
    assert mask.shape == truth.shape and np.allclose(mask.affine, truth.affine)
    assert run("evaluate", folder / "labelsTr", tmp_path / "out", "-o", tmp_path / "s.json", QUIET) == 0


def test_geometry_comes_back(tmp_path, library):
    """Oblique axes, unequal voxels, an origin."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0] * [0.5, 1.5, 3]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn, [4, -5, 6]
    data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    itk.write(tmp_path / "a.nrrd", nibabel.Nifti1Image(data, affine))
    found = itk.read(tmp_path / "a.nrrd")
    assert np.array_equal(np.asarray(found.dataobj), data) and np.allclose(found.affine, affine, atol=1e-6)
    assert np.allclose(found.header.get_zooms(), [0.5, 1.5, 3])


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    (tmp_path / "a.mha").write_bytes(b"x")
    rejected(lambda: itk.read(tmp_path / "a.mha"), "a.mha", "pip install SimpleITK")


def test_damaged_files(tmp_path, library):
    from vmamba.medical.readers import load_header

    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004")
    rejected(lambda: load_header(tmp_path / "a.nrrd"), "a.nrrd: cannot be read (8 bytes")

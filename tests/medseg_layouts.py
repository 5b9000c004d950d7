"""Tiny data sets in the layouts of the 2D papers for the tests of medseg: squares to find."""

from pathlib import Path

import numpy as np
from PIL import Image


def blocks(rng: np.random.Generator, h: int, w: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Image from 0 to 1 float32 and classes uint8, both (h, w): a rectangle of each class, as bright as its number."""
    label = np.zeros((h, w), np.uint8)
    for k in range(1, classes):
        y, x = int(rng.integers(h - 9)), int(rng.integers(w - 9))
        label[y : y + 9, x : x + 9] = k
    image = 0.1 + 0.8 * label / (classes - 1) + rng.normal(0, 0.02, (h, w))
    return np.clip(image, 0, 1).astype(np.float32), label


def isic(folder: Path, counts: "dict[str, int] | None" = None, ending: str = "png", size=(30, 44)) -> Path:
    """Pictures and masks of 0 and 255 for train, val and test; masks of jpg pictures have the challenge's names."""
    rng = np.random.default_rng(0)
    for part, count in (counts or {"train": 6, "val": 3}).items():
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True)
        for i in range(count):
            image, label = blocks(rng, size[0] + i, size[1], 2)
            suffix = "_segmentation" if ending == "jpg" else ""
            colour = np.stack([image, 0.8 * image, 0.5 * image], -1)
            Image.fromarray((255 * colour).astype(np.uint8)).save(folder / f"{part}/images/{part}_{i}.{ending}")
            Image.fromarray(255 * label).save(folder / f"{part}/masks/{part}_{i}{suffix}.png")
    return folder


def synapse(folder: Path, scans: int = 3, slices: int = 4, test: int = 2, size=(40, 40)) -> Path:
    """Lists, slices .npz and volumes .npy.h5 of 9 classes."""
    import h5py

    rng = np.random.default_rng(1)
    for name in ("lists/lists_Synapse", "train_npz", "test_vol_h5"):
        (folder / name).mkdir(parents=True)
    names = [f"case{c:04d}_slice{s:03d}" for c in range(scans) for s in range(slices)]
    for name in names:
        image, label = blocks(rng, *size, 9)
        np.savez(folder / f"train_npz/{name}.npz", image=image, label=label.astype(np.float32))
    (folder / "lists/lists_Synapse/train.txt").write_text("\n".join(names) + "\n")
    volumes = [f"case{90 + i:04d}" for i in range(test)]
    for name in volumes:
        image, label = (np.stack(x) for x in zip(*(blocks(rng, *size, 9) for _ in range(3)), strict=True))
        with h5py.File(folder / f"test_vol_h5/{name}.npy.h5", "w") as file:
            file["image"], file["label"] = image, label.astype(np.float32)
    (folder / "lists/lists_Synapse/test_vol.txt").write_text("\n".join(volumes) + "\n")
    return folder


def acdc(folder: Path, ending: str = ".npz") -> Path:
    """Lists, slices and volumes .npz of 4 classes with the keys img and label; the lists name the files' ending."""
    rng = np.random.default_rng(2)
    parts = {
        "train": [f"case_{c:03d}_slice{t}_{s}" for c in (1, 2) for t in ("ED", "ES") for s in range(2)],
        "valid": ["case_003_sliceED_0", "case_003_sliceES_1"],
        "test": ["case_004_volume_ED", "case_004_volume_ES"],
    }
    (folder / "lists_ACDC").mkdir(parents=True)
    for part, names in parts.items():
        (folder / part).mkdir()
        for name in names:
            image, label = (np.stack(x) for x in zip(*(blocks(rng, 37, 33, 4) for _ in range(3)), strict=True))
            volume = part == "test"
            np.savez(
                folder / f"{part}/{name}.npz", img=image if volume else image[0], label=label if volume else label[0]
            )
        (folder / f"lists_ACDC/{part}.txt").write_text("".join(f"{name}{ending}\n" for name in names))
    return folder

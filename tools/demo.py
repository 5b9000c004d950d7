"""make demo: trains a small VM-UNet on the MRI in nilearn's wheel, predicts slices it never saw, draws them.

Writes demo/{overlay.png, curves.png, prediction.nii.gz, summary.json} and demo/run; at most 3.5 minutes of training.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

MINUTES = 3.5
EPOCHS = 16
SETTINGS: dict[str, Any] = {
    "preset": "small",
    "batch_size": 4,
    "lr": 2e-3,
    "min_lr": 2e-5,
    "normalisation": "dataset",
    "augmentation": "mirror",
}


def main() -> int:
    """Runs the demo; prints ``mean Dice 0.xx`` as its last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder to write (default demo)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time to train for at most (default 3.5)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="planned epochs")
    args = parser.parse_args()
    from vmamba.errors import UserError
    from vmamba.medical.train import Interrupted

    try:
        summary = demo(args.output, args.minutes, args.epochs)
    except UserError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        return 130
    print(f"mean Dice {summary['foreground_mean']['Dice']:.2f}")
    return 0


def demo(output: Path, minutes: float, epochs: int) -> dict:
    """Trains, predicts the held-out block, evaluates it and draws it; returns the evaluation."""
    from vmamba.medical.evaluate import evaluate, table
    from vmamba.medical.predict import Output, predict
    from vmamba.medical.runs import read_json, write_json
    from vmamba.medical.spec import Settings
    from vmamba.medical.train import train

    run = output / "run"
    settings = Settings(epochs=epochs, max_minutes=minutes, **SETTINGS)
    training = train(run, settings, overwrite=(run / "config.json").exists())
    held_out = run / "test"
    predicted = predict([held_out / "images"], run, run / "prediction", to=Output(overwrite=True), device="cpu")[0]
    summary = evaluate(held_out / "labels", run / "prediction", progress=False)
    shutil.copyfile(predicted, output / "prediction.nii.gz")
    shutil.copyfile(run / "curves.png", output / "curves.png")
    draw(output / "overlay.png", held_out, predicted, summary)
    write_json(output / "summary.json", {**summary, "training": training, "settings": read_json(run / "config.json")})
    print(table(summary))
    print(f"{output}: overlay.png, curves.png, prediction.nii.gz, summary.json")
    return summary


def draw(path: Path, held_out: Path, predicted: Path, summary: dict) -> None:
    """Image, truth and prediction of four held-out slices beside each other."""
    import numpy as np

    from vmamba.medical.mri import AXIS, CLASSES
    from vmamba.medical.plots import save_overlay
    from vmamba.medical.readers import read_affine, read_image, read_label

    source = next((held_out / "images").iterdir())
    image = read_image([source], AXIS)
    masks = {"truth": held_out / "labels" / source.name, "VM-UNet": predicted}
    slices = np.linspace(0, len(image) - 1, 3).round().astype(int).tolist()
    affine = read_affine(source)
    names = {s: f"z = {affine[2, 2] * s + affine[2, 3]:.0f} mm" for s in slices}
    dice = [row["Dice"] for row in summary["mean"].values()]
    figures = ", ".join(f"{name} {d:.3f}" for name, d in zip(CLASSES[1:], dice, strict=True))
    stacks = {name: read_label(p, AXIS) for name, p in masks.items()}
    save_overlay(path, image, stacks, CLASSES, slices=names, upright=True, title=f"Held-out slices: Dice {figures}")


if __name__ == "__main__":
    sys.exit(main())

"""vmamba medseg train | predict | evaluate: medical segmentation of 2D images and of NIfTI volumes slice by slice."""

import argparse
import ast
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vmamba.errors import UserError

TRAIN = """examples:
  vmamba medseg train -o runs/mri --preset small --epochs 30 --batch-size 8
  vmamba medseg train --data DIR -o runs/first        (DIR/images/NAME.png, DIR/labels/NAME.png, or .nii.gz)
  vmamba medseg train --data DIR -o runs/first --resume"""
PREDICT = "example:\n  vmamba medseg predict -i DIR/images -m runs/first -o predictions --overlay"
EVALUATE = "example:\n  vmamba medseg evaluate DIR/labels predictions -o summary.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "--data": {"help": "folder with images/ and labels/ (default: the MRI in nilearn's wheel)"},
    "--model": {"help": "network of vmamba list (default vmunet)"},
    "--preset": {"help": "published, or small (for a CPU; vmunet only)"},
    "--epochs": {"type": int, "help": "default 300, as published"},
    "--batch-size": {"type": int, "help": "slices per step and process (default 32)"},
    "--lr": {"type": float, "help": "AdamW's first rate (default 1e-3)"},
    "--min-lr": {"type": float, "help": "the cosine's last rate (default 1e-5)"},
    "--weight-decay": {"type": float, "help": "default 1e-2"},
    "--patch": {"type": int, "nargs": "+", "metavar": "N", "help": "height and width trained on, multiples of 32"},
    "--axis": {"type": int, "choices": (0, 1, 2), "help": "axis across which volumes are cut (default 2)"},
    "--normalisation": {"help": "zscore or minmax over each case, dataset (z-score over all training cases) or none"},
    "--augmentation": {"help": "standard (default), mirror or none"},
    "--val-fraction": {"type": float, "help": "share of the cases that validate (default 0.2)"},
    "--seed": {"type": int, "help": "decides weights, order and augmentation (default 42)"},
    "--precision": {"help": "32-true (default), bf16-mixed, 16-mixed ... (Lightning's names)"},
    "--max-minutes": {"type": float, "help": "end after this time, the cosine with it"},
}


def add_parser(subparsers: Any) -> None:
    """Adds ``medseg`` and its three commands."""
    parser = subparsers.add_parser("medseg", help="train, predict, evaluate medical segmentation", description=__doc__)
    commands = parser.add_subparsers(dest="medseg_command", required=True, metavar="train | predict | evaluate")
    _add_train(commands)
    _add_predict(commands)
    _add_evaluate(commands)


def _command(commands: Any, name: str, text: str, epilog: str, run: Any) -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=shape)
    parser.set_defaults(run=run)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", "train a network on a folder of images and labels", TRAIN, run_train)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="run folder to write")
    _add_settings(parser.add_argument_group("what decides the result (kept in RUN, not needed again to resume)"))
    parser.add_argument("--accelerator", default="auto", help="auto, cpu, gpu")
    parser.add_argument("--devices", default="auto", help="number of devices (default: all)")
    parser.add_argument("--strategy", default="auto", help="Lightning's strategy: auto, ddp, fsdp ...")
    parser.add_argument("--workers", type=int, default=0, help="processes that load and augment (default 0)")
    parser.add_argument(
        "--resume", action="store_true", help="continue RUN after its last whole epoch, to the same result"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing RUN")


def _add_settings(group: Any) -> None:
    for flag, options in SETTINGS.items():
        group.add_argument(flag, default=argparse.SUPPRESS, **options)
    group.add_argument("--set", action="append", metavar="KEY=VALUE", help="option of the network, repeatable")


def _add_predict(commands: Any) -> None:
    parser = _command(commands, "predict", "write a mask for every image", PREDICT, run_predict)
    parser.add_argument("-i", "--input", type=Path, nargs="+", required=True, help="images, or folders of them")
    parser.add_argument(
        "-m", "--model", type=Path, required=True, metavar="RUN", help="run folder (its best.ckpt) or .ckpt"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the masks")
    parser.add_argument(
        "--save-probabilities", action="store_true", help="also NAME.npz, key probabilities, class first"
    )
    parser.add_argument("--overlay", action="store_true", help="also overlays/NAME.png")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--overwrite", action="store_true", help="replace masks that exist (default: they are kept)")


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", "Dice and IoU of predicted masks by case and class", EVALUATE, run_evaluate)
    parser.add_argument("truth", type=Path, metavar="GT_DIR", help="folder of true masks")
    parser.add_argument("predicted", type=Path, metavar="PRED_DIR", help="folder of predicted masks of the same names")
    parser.add_argument("-o", "--output", type=Path, metavar="summary.json", help="also written as .csv beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing summary")


def run_train(args: argparse.Namespace) -> int:
    """vmamba medseg train"""
    _need()
    from vmamba.medical.checks import check_settings
    from vmamba.medical.runs import resumed
    from vmamba.medical.spec import Settings
    from vmamba.medical.train import Hardware, Interrupted, train

    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    if args.set:
        given["network"] = dict(_option(text) for text in args.set)
    settings = resumed(args.output, given) if args.resume else Settings(**given)
    check_settings(settings)
    hardware = Hardware(args.accelerator, args.devices, args.strategy, args.workers, not args.no_progress)
    try:
        summary = train(args.output, settings, hardware=hardware, resume=args.resume, overwrite=args.overwrite)
    except Interrupted as stop:
        print(f"{args.output}: {stop}", file=sys.stderr)
        return 130
    if summary:
        print(f"{args.output}: best validation Dice {summary['best_val_dice']:.4f} (epoch {summary['best_epoch']})")
    return 0


def run_predict(args: argparse.Namespace) -> int:
    """vmamba medseg predict"""
    _need()
    from vmamba.medical.predict import Output, predict

    to = Output(args.save_probabilities, args.overlay, args.overwrite, not args.no_progress)
    written = predict(args.input, args.model, args.output, to=to, device=args.device)
    print(f"{args.output}: {len(written)} mask(s)")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """vmamba medseg evaluate"""
    _need()
    from vmamba.medical.evaluate import evaluate, table

    summary = evaluate(args.truth, args.predicted, args.output, overwrite=args.overwrite, progress=not args.no_progress)
    print(table(summary))
    return 0


def _option(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise UserError(f"--set {text}: expected KEY=VALUE, such as dims=48,96,192,384")
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
    return key, list(read) if isinstance(read, tuple) else read


def _need() -> None:
    missing = [name for name in ("lightning", "monai", "nibabel", "matplotlib") if find_spec(name) is None]
    if missing:
        raise UserError(f"medseg needs {', '.join(missing)}; pip install 'vmamba[medical]'")

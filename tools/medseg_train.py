"""vmamba medseg train: folds of a data set in nnU-Net's layout, or one run on a folder of images and labels."""

import argparse
import ast
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.medseg import add_model, add_places, command

EXAMPLES = """examples:
  vmamba medseg train 900 2d 0 --root demo -tr nnUNetTrainerVMUNet      (DATASET CONFIG FOLD, as nnU-Net has it)
  vmamba medseg train 900 3d_fullres 0 1 2 3 4 --npz --root demo
  vmamba medseg train -o runs/mri --preset small --epochs 30 --batch-size 8
  vmamba medseg train --data DIR -o runs/first        (DIR/images/NAME.png, DIR/labels/NAME.png, or .nii.gz)
  vmamba medseg train --data DIR -o runs/first --resume
  vmamba medseg train --data Synapse -o runs/synapse --recipe msvm-synapse       (or ISIC, ACDC: docs/medseg.md)"""
BOTH: dict[str, dict[str, Any]] = {
    "--preset": {"help": "published, or small (for a CPU; VM-UNet only)"},
    "--epochs": {"type": int, "help": "default 1000 for a data set, 300 for a folder"},
    "--batch-size": {"type": int, "help": "per step and process (default: the plans', 32 for a folder)"},
    "--lr": {"type": float, "help": "first rate (default 1e-2 with sgd, 1e-3 for a folder)"},
    "--weight-decay": {"type": float, "help": "default 3e-5, 1e-2 for a folder"},
    "--patch": {"type": int, "nargs": "+", "metavar": "N", "help": "sides of the patch"},
    "--augmentation": {"help": "standard (default), mirror or none"},
    "--seed": {"type": int, "help": "decides weights, order and augmentation"},
    "--precision": {"help": "32-true (default), bf16-mixed, 16-mixed ... (Lightning's names)"},
}
DATASET: dict[str, dict[str, Any]] = {
    "--iterations": {"type": int, "help": "steps of an epoch (default 250)"},
    "--val-iterations": {"type": int, "help": "validation steps of an epoch (default 50)"},
    "--optimizer": {"choices": ("sgd", "adamw"), "help": "default sgd"},
}
FOLDER: dict[str, dict[str, Any]] = {
    "--data": {"help": "folder with images/ and labels/, or ISIC, Synapse, ACDC (default: the MRI in nilearn's wheel)"},
    "--recipe": {"help": "how a paper trains, such as vmunet-isic or msvm-synapse (default: plain, or the layout's)"},
    "--model": {"help": "network of vmamba list (default vmunet)"},
    "--min-lr": {"type": float, "help": "the cosine's last rate (default 1e-5)"},
    "--size": {"type": int, "nargs": 2, "metavar": "N", "help": "height and width that every slice is brought to"},
    "--axis": {"type": int, "choices": (0, 1, 2), "help": "axis across which volumes are cut (default 2)"},
    "--normalisation": {"help": "zscore or minmax over each case, dataset (z-score over all training cases), none ..."},
    "--val-fraction": {"type": float, "help": "share of the cases that validate (default 0.2)"},
    "--max-minutes": {"type": float, "help": "end after this time, the cosine with it"},
}


def add_commands(commands: Any) -> None:
    """Adds ``train``."""
    parser = command(commands, "train", "train a network", EXAMPLES, run_train)
    parser.add_argument("dataset", nargs="?", metavar="DATASET", help="name or number in nnUNet_raw")
    parser.add_argument("configuration", nargs="?", metavar="CONFIG", help="2d or 3d_fullres")
    parser.add_argument("folds", nargs="*", metavar="FOLD", help="0 to 4, or all; several are gathered afterwards")
    add_places(parser)
    add_model(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="RUN", help="run folder to write, without DATASET")
    for title, table in {"both": BOTH, "with DATASET": DATASET, "without DATASET": FOLDER}.items():
        group = parser.add_argument_group(f"what decides the result, {title}")
        for flag, options in table.items():
            group.add_argument(flag, default=argparse.SUPPRESS, **options)
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="option of the network, repeatable")
    text = "weights to start from: encoder.ckpt of medseg pretrain, or another training's"
    flags, unless = ("-pretrained_weights", "--pretrained"), argparse.SUPPRESS
    parser.add_argument(*flags, dest="pretrained", default=unless, metavar="FILE", help=text)
    parser.add_argument("--dry-run", action="store_true", help="check the data, print the plan, write nothing")
    parser.add_argument("--resume", "--c", action="store_true", help="continue after the last whole epoch")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing training")
    parser.add_argument("--npz", action="store_true", help="keep the validation cases' probabilities")
    parser.add_argument("--val", action="store_true", help="only validate a trained fold")
    parser.add_argument("--val-best", "--val_best", action="store_true", help="validate checkpoint_best.pth")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring in the validation")
    parser.add_argument("--accelerator", "-device", default="auto", help="auto, cpu, gpu")
    parser.add_argument("--devices", "-num_gpus", default="auto", help="number of devices (default: all)")
    parser.add_argument("--strategy", default="auto", help="Lightning's strategy: auto, ddp, fsdp ...")
    parser.add_argument(
        "--workers", type=int, help="processes that load and augment (default: 12 beside a GPU, else 0)"
    )
    parser.add_argument("--no-graph", action="store_true", help="launch each kernel of a step, not a CUDA graph")


def run_train(args: argparse.Namespace) -> int:
    """vmamba medseg train"""
    from vmamba.medical.train import Hardware, Interrupted

    strange = [flag for flag in (FOLDER if args.dataset else DATASET) if hasattr(args, _name(flag))]
    if strange:
        raise UserError(f"{', '.join(strange)}: only {'without' if args.dataset else 'with'} DATASET")
    network = dict(network_option(text) for text in args.set or ())
    where = args.accelerator, args.devices, args.strategy, args.workers
    hardware = Hardware(*where, progress=not args.no_progress, graphs=not args.no_graph)
    try:
        return (_dataset if args.dataset else _folder)(args, network, hardware)
    except Interrupted as stop:
        print(f"{args.output or args.dataset}: {stop}", file=sys.stderr)
        return 130


def _dataset(args: argparse.Namespace, network: dict[str, Any], hardware: Any) -> int:
    from vmamba.medical.checks import check_fold, check_plans, check_preset
    from vmamba.medical.crossval import gather
    from vmamba.medical.dry_run import describe_fold
    from vmamba.medical.evaluate import table
    from vmamba.medical.fold_module import FoldSettings
    from vmamba.medical.fold_train import After, train_fold
    from vmamba.medical.jobs import open_job
    from vmamba.medical.model_folder import open_model
    from vmamba.medical.raw import Places

    if not args.folds:
        raise UserError(f"train {args.dataset}: expected DATASET CONFIG FOLD, such as {args.dataset} 2d 0")
    given = {f.name: getattr(args, f.name) for f in fields(FoldSettings) if hasattr(args, f.name)}
    options = check_preset(getattr(args, "preset", "published"), args.tr) | network
    settings = FoldSettings(**{**given, "trainer": args.tr, "network": options})
    job = open_job(Places.find(args.root), args.dataset, args.configuration, args.tr, args.p)
    check_fold(settings, job.configuration)
    check_plans(job, () if args.resume or args.val else args.folds)
    if args.dry_run:
        return _say(describe_fold(job, fold, settings) for fold in args.folds)
    after = After(args.npz, args.val_best, args.val, not args.disable_tta)
    for fold in args.folds:
        summary = train_fold(job, fold, settings, hardware, resume=args.resume, overwrite=args.overwrite, after=after)
        if summary:
            print(f"fold {fold}: mean validation Dice {summary['foreground_mean']['Dice']:.4f}")
    if len(args.folds) > 1 and "all" not in args.folds:
        summary = gather(open_model(job.folder), job.dataset, args.folds, progress=hardware.progress)
        print(f"{job.folder}: folds {', '.join(args.folds)} together\n{table(summary)}")
    return 0


def _folder(args: argparse.Namespace, network: dict[str, Any], hardware: Any) -> int:
    from vmamba.medical.checks import check_settings
    from vmamba.medical.dry_run import describe_run
    from vmamba.medical.recipes import settings_for
    from vmamba.medical.runs import resumed
    from vmamba.medical.spec import Settings
    from vmamba.medical.train import train

    if args.output is None and (args.resume or not args.dry_run):
        raise UserError("train: expected -o RUN, or DATASET CONFIG FOLD")
    run = args.output or Path()
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    if network:
        given["network"] = network
    settings = resumed(run, given) if args.resume else settings_for(given)
    check_settings(settings)
    if args.dry_run:
        return _say([describe_run(settings)])
    summary = train(run, settings, hardware=hardware, resume=args.resume, overwrite=args.overwrite)
    if summary:
        best = f"{summary['best_val_dice']:.4f} in the best epoch, {summary['best_epoch']} ({summary['best_by']})"
        print(f"{run}: validation Dice {best}")
    return 0


def _say(texts: Iterable[str]) -> int:
    for text in texts:
        print(text)
    return 0


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def network_option(text: str) -> tuple[str, Any]:
    """Key and value of --set KEY=VALUE."""
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise UserError(f"--set {text}: expected KEY=VALUE, such as dims=48,96,192,384")
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
    return key, list(read) if isinstance(read, tuple) else read

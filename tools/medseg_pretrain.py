"""vmamba medseg pretrain: an encoder learns from images without labels, by MambaMIM."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.medseg import add_model, add_places, command
from vmamba.tools.medseg_train import network_option

EXAMPLES = """examples:
  vmamba medseg pretrain 900 3d_fullres -o runs/first --root demo -tr hymamba
  vmamba medseg pretrain 900 2d 0 -o runs/second --root demo -tr nnUNetTrainerVMUNet --images MORE/imagesTr
  vmamba medseg pretrain --data DIR -o runs/third --model hymamba --window -175 250 --spacing 1.5 --normalisation minmax
afterwards: vmamba medseg train 900 3d_fullres 0 --root demo -tr hymamba -pretrained_weights runs/first/encoder.ckpt"""
BOTH: dict[str, dict[str, Any]] = {
    "--mask-ratio": {"type": float, "help": "share of the cells that are hidden (default 0.75)"},
    "--masks": {"help": "one mask for each sample (default), or one for the batch: faster in 2D on a GPU"},
    "--toki": {"help": "token interpolation: corrected (default), or official, with the slip of the original code"},
    "--width": {"type": int, "help": "channels of the decoder's coarsest map (default 768)"},
    "--patch": {"type": int, "nargs": "+", "metavar": "N", "help": "sides (default: the plans', 224 in 2D, 96 in 3D)"},
    "--batch-size": {"type": int, "help": "per step and process (default: the plans', 32 in 2D, 4 in 3D)"},
    "--epochs": {"type": int, "help": "default 100"},
    "--iterations": {"type": int, "help": "steps of an epoch (default 250)"},
    "--lr": {"type": float, "help": "highest rate (default 1e-4)"},
    "--warmup": {"type": float, "help": "share of the steps until it is reached (default 0.4)"},
    "--weight-decay": {"type": float, "help": "at first (default 0.04)"},
    "--last-weight-decay": {"type": float, "help": "at last (default 0.2)"},
    "--seed": {"type": int, "help": "decides weights, patches and masks (default 12345)"},
    "--precision": {"help": "32-true (default), bf16-mixed, 16-mixed ... (Lightning's names)"},
}
DATASET: dict[str, dict[str, Any]] = {
    "--images": {"nargs": "+", "metavar": "DIR", "help": "further folders of images named as in imagesTr"},
}
FOLDER: dict[str, dict[str, Any]] = {
    "--data": {"metavar": "DIR", "help": "folder of images, or with images/ in it"},
    "--model": {"dest": "network", "help": "network of vmamba list (default hymamba, for volumes)"},
    "--axis": {"type": int, "choices": (0, 1, 2), "help": "axis across which volumes are cut in 2D (default 2)"},
    "--normalisation": {"help": "zscore (default) or minmax over each case, or none"},
    "--window": {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH"), "help": "values are cut to it before"},
    "--spacing": {"type": float, "nargs": "+", "metavar": "MM", "help": "voxels to resample volumes to, x y z or one"},
}


def add_commands(commands: Any) -> None:
    """Adds ``pretrain``."""
    text = "pre-train a network's encoder without labels (MambaMIM)"
    parser = command(commands, "pretrain", text, EXAMPLES, run_pretrain)
    parser.add_argument("dataset", nargs="?", metavar="DATASET", help="name or number in nnUNet_raw, planned")
    parser.add_argument("configuration", nargs="?", metavar="CONFIG", help="2d or 3d_fullres")
    parser.add_argument(
        "fold", nargs="?", metavar="FOLD", help="leave out its validation cases; all (default); none: --images alone"
    )
    add_places(parser)
    add_model(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="run folder to write")
    for title, table in {"both": BOTH, "with DATASET": DATASET, "without DATASET": FOLDER}.items():
        group = parser.add_argument_group(f"what decides the result, {title}")
        for flag, options in table.items():
            group.add_argument(flag, default=argparse.SUPPRESS, **options)
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="option of the network, repeatable")
    parser.add_argument("--resume", "--c", action="store_true", help="continue after the last whole epoch")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run")
    parser.add_argument("--accelerator", "-device", default="auto", help="auto, cpu, gpu")
    parser.add_argument("--devices", default="auto", help="number of devices (default: all)")
    parser.add_argument("--strategy", default="auto", help="Lightning's strategy: auto, ddp, fsdp ...")
    parser.add_argument("--workers", type=int, help="processes that load (default: 12 beside a GPU, else 0)")


def run_pretrain(args: argparse.Namespace) -> int:
    """vmamba medseg pretrain"""
    from vmamba.medical.pretrain import pretrain
    from vmamba.medical.pretrain_settings import PretrainSettings, check_pretraining, resumed
    from vmamba.medical.raw import Places
    from vmamba.medical.train import Hardware, Interrupted

    given = _given(args, [f.name for f in fields(PretrainSettings)])
    settings = resumed(args.output, given) if args.resume else PretrainSettings(**given)
    check_pretraining(settings)
    hardware = Hardware(args.accelerator, args.devices, args.strategy, args.workers, not args.no_progress)
    places = Places.find(args.root) if settings.dataset else None
    try:
        summary = pretrain(
            args.output, settings, places, hardware=hardware, resume=args.resume, overwrite=args.overwrite
        )
    except Interrupted as stop:
        print(f"{args.output}: {stop}", file=sys.stderr)
        return 130
    if summary:
        change = f"{summary['first_loss']:.4f} in the first epoch, {summary['last_loss']:.4f} in the last"
        print(f"{args.output / 'encoder.ckpt'}: trained on {summary['images']} image(s), loss {change}")
    return 0


def _given(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """The settings that were given on the command line."""
    strange = [flag for flag, o in (FOLDER if args.dataset else DATASET).items() if hasattr(args, _dest(flag, o))]
    if strange:
        raise UserError(f"{', '.join(strange)}: only {'without' if args.dataset else 'with'} DATASET")
    given = {name: getattr(args, name) for name in names if hasattr(args, name) and getattr(args, name) is not None}
    if args.dataset:
        if not args.configuration:
            raise UserError(f"pretrain {args.dataset}: expected DATASET CONFIG, such as {args.dataset} 3d_fullres")
        given |= {"network": args.tr, "plans": args.p}
    elif not args.resume and "data" not in given:
        raise UserError("pretrain: expected DATASET CONFIG, or --data DIR")
    if args.set:
        given["options"] = dict(network_option(text) for text in args.set)
    return given


def _dest(flag: str, options: dict[str, Any]) -> str:
    return options.get("dest", flag.removeprefix("--").replace("-", "_"))

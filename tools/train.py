"""vmamba train: train what a configuration of mmengine describes (a detector, a segmentor ...)."""

import argparse
import sys
from typing import Any

from vmamba.tools.mm_config import add_arguments, configuration, leave, runner
from vmamba.tools.zoo import add_command


def add_parser(subparsers: Any) -> None:
    """Adds ``train``."""
    parser = add_command(
        subparsers,
        "train",
        "train what a configuration of mmengine describes",
        "vmamba train upernet_vmamba_tiny_s1l8_ade20k_160k.py --amp --work-dir runs/ade20k\n"
        "  tools/dist_train.sh upernet_vmamba_tiny_s1l8_ade20k_160k.py 8 --amp",
    )
    add_arguments(parser)
    dtypes = ("float16", "bfloat16")
    parser.add_argument("--amp", nargs="?", const=dtypes[0], choices=dtypes, help="mixed precision; float16 if alone")
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="FILE", help="go on from a checkpoint; if alone, from the last one"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba train"""
    cfg = configuration(args)
    if args.amp:
        scale = cfg.optim_wrapper.get("loss_scale", "dynamic")
        cfg.optim_wrapper.update(type="AmpOptimWrapper", dtype=args.amp, loss_scale=scale)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
    runner(cfg).train()
    leave()
    return 0


if __name__ == "__main__":
    from vmamba.tools.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))

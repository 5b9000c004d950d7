"""vmamba detect: find objects in pictures with a detector of mmdet."""

import argparse
import sys
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.mm_predict import add_arguments, run_task
from vmamba.tools.zoo import add_command


def add_parser(subparsers: Any) -> None:
    """Adds ``detect``."""
    parser = add_command(
        subparsers,
        "detect",
        "find objects in pictures with a detector of mmdet",
        "vmamba detect photos/ --config mask_rcnn_vmamba_tiny_s1l8_coco_1x.py --checkpoint mask_rcnn.pth -o found",
    )
    add_arguments(parser)
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, metavar="SCORE", help="leave out what scores lower (default 0.3)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba detect"""
    threshold = args.score_threshold
    if not 0 <= threshold <= 1:
        raise UserError(f"--score-threshold must be from 0 to 1, got {threshold:g}")

    def task(classes: Any) -> Any:
        from vmamba.mm.detection import Detection

        return Detection(classes, threshold)

    return run_task(args, "mmdet", task, {"score_threshold": threshold})


if __name__ == "__main__":
    from vmamba.tools.cli import main

    sys.exit(main(["detect", *sys.argv[1:]]))

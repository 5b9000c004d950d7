"""vmamba shapes: write a small data set of shapes in the layouts of COCO and ADE20K, to try training on."""

import argparse
from pathlib import Path
from typing import Any

from vmamba.tools.zoo import add_command


def add_parser(subparsers: Any) -> None:
    """Adds ``shapes``."""
    text = "write a small data set of shapes in the layouts of COCO and ADE20K, to try training on"
    parser = add_command(subparsers, "shapes", text, "vmamba shapes data/shapes")
    parser.add_argument("output", type=Path, metavar="DIR", help="gets the folders coco and ade; must not exist")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="pictures to train on (default 1000)")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="pictures to validate (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="decides every picture (default 0)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba shapes"""
    from vmamba.shape_data import write_shapes
    from vmamba.shapes import CLASSES

    counts = {"images": args.images, "val": args.val}
    folder = write_shapes(args.output, **counts, seed=args.seed, progress=not args.no_progress)
    print(f"{folder}: {args.images} + {args.val} pictures of {', '.join(CLASSES)}, in {folder}/coco and {folder}/ade")
    return 0

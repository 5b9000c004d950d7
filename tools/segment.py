"""vmamba segment: tell the classes of a picture's pixels with a segmentor of mmseg."""

import argparse
import sys
from typing import Any

from vmamba.tools.mm_predict import add_arguments, run_task
from vmamba.tools.zoo import add_command


def add_parser(subparsers: Any) -> None:
    """Adds ``segment``."""
    parser = add_command(
        subparsers,
        "segment",
        "tell the classes of a picture's pixels with a segmentor of mmseg",
        "vmamba segment photos/ --config upernet_vmamba_tiny_s1l8_ade20k_160k.py --checkpoint upernet.pth -o labelled",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba segment"""

    def task(classes: Any) -> Any:
        from vmamba.mm.segmentation import Segmentation

        return Segmentation(classes)

    return run_task(args, "mmseg", task, {})


if __name__ == "__main__":
    from vmamba.tools.cli import main

    sys.exit(main(["segment", *sys.argv[1:]]))

"""The command ``vmamba``: each sub-command is a file of this folder with ``add_parser(subparsers)``."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from vmamba import __version__
from vmamba.errors import UserError

COMMANDS = (
    "list_models",
    "info",
    "scans",
    "doctor",
    "benchmark",
    "convert",
    "medseg",
    "train",
    "test",
    "detect",
    "segment",
    "shapes",
    "curves",
)
EXAMPLES = """examples:
  vmamba list "vmamba_tiny*"
  vmamba info vmamba_tiny_s1l8
  vmamba scans --plot scans.png
  vmamba doctor
  vmamba benchmark models vmamba_tiny_s1l8 convnext_tiny --batch 8
  vmamba medseg train -o runs/mri --preset small --epochs 30 --batch-size 8
  vmamba train configs/segmentation/upernet_vmamba_tiny_s1l8_ade20k_160k.py --amp
  vmamba detect photos/ --config mask_rcnn_vmamba_tiny_s1l8_coco_1x.py --checkpoint mask_rcnn.pth -o found"""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command; parsed arguments carry ``run``, a function(args) -> exit code."""
    shape = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "vmamba", description="Vision state-space models.", epilog=EXAMPLES, formatter_class=shape
    )
    top.add_argument("--version", action="version", version=f"vmamba {__version__}")
    subparsers = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name in COMMANDS:
        import_module(f"vmamba.tools.{name}").add_parser(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 after printing one line for a mistake of the user's."""
    args = parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"vmamba: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())

"""vmamba medseg: medical segmentation, on data sets in nnU-Net's layout and on plain folders."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vmamba.errors import UserError

PARTS = (  # each adds some of the commands
    "medseg_data",
    "medseg_train",
    "medseg_pretrain",
    "medseg_predict",
    "medseg_score",
    "medseg_benchmark",
    "medseg_compare",
    "medseg_best",
)
AT_ONCE = 4  # cases, if not asked otherwise
NEEDED = ("lightning", "monai", "nibabel", "matplotlib", "sklearn")


def add_parser(subparsers: Any) -> None:
    """Adds ``medseg`` and its commands."""
    parser = subparsers.add_parser("medseg", help="train, predict, evaluate medical segmentation", description=__doc__)
    commands = parser.add_subparsers(dest="medseg_command", required=True, metavar="COMMAND")
    for name in PARTS:
        import_module(f"vmamba.tools.{name}").add_commands(commands)


def command(
    commands: Any, name: str, text: str, epilog: str, run: Any, *, silent: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """A command's parser; ``run(args) -> exit code`` is called when its libraries are there.

    ``silent`` are nnU-Net's words for --no-progress.
    """

    def checked(args: argparse.Namespace) -> int:
        missing = [package for package in NEEDED if find_spec(package) is None]
        if missing:
            raise UserError(f"medseg needs {', '.join(missing)}; pip install 'vmamba[medical]'")
        from vmamba.safety import refusals

        try:
            with refusals(Path(getattr(args, "output", None) or ".")):
                return run(args)
        except KeyboardInterrupt:
            print(f"{name}: interrupted; what is finished is kept, the same command goes on there", file=sys.stderr)
            return 130

    shape = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=shape)
    parser.set_defaults(run=checked)
    parser.add_argument("--no-progress", *silent, action="store_true", help="no progress bar")
    return parser


def add_places(parser: argparse.ArgumentParser) -> None:
    """The option that says where nnU-Net's three folders are."""
    parser.add_argument(
        "--root",
        type=Path,
        help="folder with nnUNet_raw, nnUNet_preprocessed and nnUNet_results (default: environment)",
    )


def add_threads(parser: argparse.ArgumentParser, flag: str, what: str, **options: Any) -> None:
    """The option that says how many cases are ``what`` at a time, by default as :func:`threads` decides."""
    default = options.get("default", f"the CPUs, at most {AT_ONCE}")
    count = f"cases {what} at a time (default: {default}); each takes memory"
    parser.add_argument(flag, type=int, metavar="N", help=count, **options)


def threads(flag: str, count: int | None, least: int = 1) -> int:
    """``count`` of an option of :func:`add_threads`, or what it is without; UserError if it is below ``least``."""
    from vmamba.machine import cpus

    if count is not None and count < least:
        raise UserError(f"{flag} {count}: expected at least {least}")
    return min(cpus(), AT_ONCE) if count is None else count


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a trained or planned configuration, in nnU-Net's words."""
    text = "trainer (default %(default)s), or network of vmamba list"
    parser.add_argument("-tr", default="nnUNetTrainerUMambaBot", help=text)
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="name of the plans (default nnUNetPlans)")

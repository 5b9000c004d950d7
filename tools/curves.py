"""vmamba curves: losses and metrics of runs of vmamba train as a picture and as JSON."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.zoo import add_command


def add_parser(subparsers: Any) -> None:
    """Adds ``curves``."""
    text = "draw losses and metrics of runs of vmamba train, and write them as JSON"
    parser = add_command(subparsers, "curves", text, "vmamba curves work_dirs/* -o curves.png")
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="work folders of vmamba train")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png", help="and FILE.json beside it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba curves"""
    if args.output.suffix != ".png":
        raise UserError(f"-o writes a PNG, so its name must end in .png, got {args.output}")
    try:
        from vmamba.mm.curves import draw, read_run
    except ImportError as error:
        raise UserError(str(error)) from error
    runs = [read_run(folder) for folder in args.runs]
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(runs).savefig(args.output, dpi=130)
        args.output.with_suffix(".json").write_text(json.dumps({r.name: r.as_dict() for r in runs}, indent=1))
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror or error})") from error
    for r in runs:
        final = ", ".join(f"{name} {value:.4g}" for name, value in r.as_dict()["final"].items())
        print(f"{r.name}: loss {r.train[max(r.train)]['loss']:.4g}" + (f"; {final}" if final else ""))
    return 0


if __name__ == "__main__":
    from vmamba.tools.cli import main

    sys.exit(main(["curves", *sys.argv[1:]]))

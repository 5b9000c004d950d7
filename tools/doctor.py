"""vmamba doctor: what is installed, and which backend each operator takes here and why."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.zoo import add_command


def add_parser(subparsers: Any) -> None:
    """Adds ``doctor``."""
    text = "what is installed, and which backend each operator takes here and why"
    parser = add_command(subparsers, "doctor", text, "vmamba doctor --json > machine.json")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--config", metavar="FILE", help="say also what a configuration of mmengine lacks")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba doctor"""
    from vmamba.doctor import doctor

    report = doctor()
    lacking = _advice(args.config) if args.config else None
    print(json.dumps({**asdict(report), "config": lacking}, indent=2) if args.json else report)
    if args.config and not args.json:
        print(f"{args.config}: {lacking or 'our networks are found'}")
    return 1 if lacking else 0


def _advice(path: str) -> str | None:
    from vmamba.openmmlab import advice_on, explain

    try:
        from mmengine import Config

        return advice_on(Config.fromfile(path, import_custom_modules=False).to_dict())
    except FileNotFoundError as error:
        raise UserError(f"no configuration at {path}") from error
    except ImportError as error:
        raise UserError(explain(error)) from error

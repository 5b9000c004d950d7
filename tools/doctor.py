"""vmamba doctor: what is installed, and which backend each operator takes here and why."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from vmamba.tools.zoo import add_command


def add_parser(subparsers: Any) -> None:
    """Adds ``doctor``."""
    text = "what is installed, and which backend each operator takes here and why"
    parser = add_command(subparsers, "doctor", text, "vmamba doctor --json > machine.json")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba doctor"""
    from vmamba.doctor import doctor

    report = doctor()
    print(json.dumps(asdict(report), indent=2) if args.json else report)
    return 0

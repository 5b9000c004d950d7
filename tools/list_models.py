"""vmamba list: the networks of the zoo."""

import argparse
import json
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.zoo import add_command, entry_of, parameters, skeleton

HEADER = ("name", "params (M)", "input", "top-1 (%)", "source")


def add_parser(subparsers: Any) -> None:
    """Adds ``list``."""
    parser = add_command(
        subparsers, "list", "list the networks, their sizes and published weights", 'vmamba list "*tiny*"'
    )
    parser.add_argument("pattern", nargs="?", default="*", help="part of a name, or a pattern with * and ?")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba list"""
    from vmamba.registry import list_models

    names = list_models(args.pattern)
    if not names:
        known = ", ".join(list_models())
        raise UserError(f"no network matches {args.pattern!r}; there are {known}")
    rows = [_row(name) for name in names]
    print(json.dumps(rows, indent=2) if args.json else _table(rows))
    return 0


def _row(name: str) -> dict[str, Any]:
    entry = entry_of(name)
    return {
        "name": name,
        "parameters": parameters(skeleton(name)),
        "input_size": entry.weights.input_size if entry.weights else None,
        "top1": entry.weights.top1 if entry.weights else None,
        "source": entry.weights.url if entry.weights else None,
        "paper": f"arXiv:{entry.paper}",
        "origin": entry.origin,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ("<", ">", ">", ">", "<")
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    size, top1 = row["input_size"], row["top1"]
    source = f"{row['origin']} ({row['paper']})"
    return (
        row["name"],
        f"{row['parameters'] / 1e6:.1f}",
        str(size) if size else "-",
        f"{top1:.1f}" if top1 else "-",
        source if row["source"] else f"{source}, no weights linked",
    )

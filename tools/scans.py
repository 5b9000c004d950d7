"""vmamba scans: the orders in which maps are read, as a list and as a picture."""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.zoo import add_command


def add_parser(subparsers: Any) -> None:
    """Adds ``scans``."""
    text = "list the scans (orders in which a map is read), or draw them"
    example = 'vmamba scans cross hilbert "local(window=3)" --plot scans.png --grid 6x8'
    parser = add_command(subparsers, "scans", text, example)
    parser.add_argument("names", nargs="*", help="scans, also package.module.function (default: all of the library's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw every route as arrows, coloured by step")
    parser.add_argument("--grid", metavar="HxW", default="6x8", help="size of the map that is drawn (default: 6x8)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba scans"""
    from vmamba.scans import Scan, list_scans

    sys.path.insert(0, "")  # a user's module in the current folder, as with python -m
    try:
        scans = [Scan(name) for name in args.names or list_scans()]
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.plot:
        _plot(args.plot, scans, _grid(args.grid))
        return 0
    rows = [describe(scan) for scan in scans]
    print(json.dumps(rows, indent=2) if args.json else _table(rows))
    return 0


def describe(scan: Any) -> dict[str, Any]:
    """What ``vmamba scans --json`` says of a :class:`vmamba.scans.Scan`."""
    function = getattr(scan.routes, "func", scan.routes)  # of a partial
    document = inspect.getmodule(function) if getattr(function, "__name__", "") == "routes" else function
    text = inspect.getdoc(document) or ""
    first = " ".join(text.split("\n\n")[0].split())
    parameters = list(inspect.signature(scan.routes).parameters.values())[2:]
    return {
        "name": scan.name,
        "routes": scan.count,
        "parameters": {p.name: p.default for p in parameters},
        "order": re.sub(r" \([^()]*arXiv[^()]*\)", "", first),
        "papers": list(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{5})", text))),
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("name", "parameters", "routes", "arXiv", "order")]
    for row in rows:
        parameters = ", ".join(f"{key}={value}" for key, value in row["parameters"].items())
        lines.append((row["name"], parameters, str(row["routes"]), ", ".join(row["papers"]), row["order"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    h, w = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= h * w <= 1024:
        raise UserError(f"--grid is HEIGHTxWIDTH with at most 1024 pixels, such as 6x8, got {text!r}")
    return h, w


def _plot(path: Path, scans: Sequence[Any], grid: tuple[int, int]) -> None:
    if path.suffix != ".png":
        raise UserError(f"--plot writes a PNG; the file must end in .png, got {str(path)!r}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into")
    try:
        from vmamba.tools.draw_scans import save
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error}); pip install 'vmamba[medical]'") from None
    save(path, scans, *grid)
    print(f"wrote {path}")

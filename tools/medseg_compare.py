"""vmamba medseg compare: networks trained and tried on one data set, their Dice in a table."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.medseg import add_places, command

EXAMPLE = """Every network is trained in the folds, predicts imagesTs, is post-processed as its cross-validation chose,
and scored against labelsTs; then the ensemble of all. Each is a process of the other commands, with a .log beside it.

example:
  vmamba medseg compare vmunet:2d umamba_bot:3d_fullres -d 900 --root demo -o demo/compared --options "--epochs 4" """


def add_commands(commands: Any) -> None:
    """Adds ``compare``."""
    text = "train and try several networks on one data set"
    parser = command(commands, "compare", text, EXAMPLE, run_compare)
    parser.add_argument("networks", nargs="+", metavar="NETWORK:CONFIG", help="such as umamba_bot:3d_fullres")
    parser.add_argument("-d", required=True, metavar="DATASET", help="name or number, preprocessed")
    parser.add_argument("-f", nargs="+", default=list("01234"), metavar="FOLD", help="folds (default 0 1 2 3 4)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder for predictions and tables")
    parser.add_argument("--options", default="", metavar="TEXT", help="options of every training")
    parser.add_argument("--options-2d", default="", metavar="TEXT", help="of those of the configuration 2d")
    parser.add_argument("--options-3d", default="", metavar="TEXT", help="of the others")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time, on one GPU or on the CPU (default 1)")
    parser.add_argument("--minutes", type=float, help="that a network may take, else it is told as a failure")
    parser.add_argument("--accelerator", "-device", default="auto", choices=("auto", "cpu", "gpu"))
    add_places(parser)


def run_compare(args: argparse.Namespace) -> int:
    """vmamba medseg compare"""
    from tqdm import tqdm

    from vmamba.medical.compare import Comparison, Entry, compare, table
    from vmamba.medical.jobs import open_job
    from vmamba.medical.raw import Places
    from vmamba.safety import only_writer

    if args.root is None:
        raise UserError("compare: expected --root FOLDER")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: expected at least 1")
    if args.output.exists():
        raise UserError(f"{args.output}: exists; give another folder")
    entries, places = [], Places.find(args.root)
    for text in args.networks:
        network, sign, configuration = text.partition(":")
        if not sign:
            raise UserError(f"{text}: expected NETWORK:CONFIG, such as umamba_bot:3d_fullres")
        own = args.options_2d if configuration == "2d" else args.options_3d
        entries.append(Entry(network, configuration, tuple(shlex.split(f"{args.options} {own}"))))
        job = open_job(places, args.d, configuration, network, "nnUNetPlans")
    dataset = job.dataset
    comparison = Comparison(args.root, dataset, tuple(args.f), args.output, args.accelerator, args.minutes)
    with only_writer(args.output), tqdm(total=len(entries), unit="network", disable=args.no_progress) as bar:

        def done(row: dict[str, Any]) -> None:
            tqdm.write(f"{row['name']}: {row['failure'] or 'done'}")
            bar.update()

        rows = compare(comparison, entries, args.jobs, done)
    print(table(rows), end="")
    return 0 if not all(row["failure"] for row in rows) else 1

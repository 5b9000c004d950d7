"""vmamba medseg evaluate | plot: figures and pictures of predictions."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.medseg import add_threads, command, threads

EVALUATE = """examples:
  vmamba medseg evaluate DIR/labels predictions -o summary.json
  vmamba medseg evaluate labelsTs predicted -djfile dataset.json -o predicted/summary.json"""
PLOT = "example:\n  vmamba medseg plot -i imagesTs -p predicted -r labelsTs -o pictures"


def add_commands(commands: Any) -> None:
    """Adds the two commands."""
    parser = command(commands, "evaluate", "score predicted masks by case and class", EVALUATE, run_evaluate)
    parser.add_argument("truth", type=Path, metavar="GT_DIR", help="folder of true masks, or a paper's layout")
    parser.add_argument("predicted", type=Path, metavar="PRED_DIR", help="folder of predicted masks of the same names")
    parser.add_argument("-o", "--output", type=Path, metavar="summary.json", help="also written as .csv beside it")
    help_text = "labels, regions and the ignore label (default: PRED_DIR/dataset.json, if there is one)"
    parser.add_argument("-djfile", type=Path, metavar="dataset.json", help=help_text)
    parser.add_argument(
        "--convention", help="nnunet (default), or the papers': isic, synapse, acdc (default of their layouts)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing summary")
    parser.add_argument(
        "--chill", action="store_true", help="masks without a prediction do not count (default: refused)"
    )
    add_threads(parser, "-np", "compared")
    parser.add_argument("-pfile", type=Path, metavar="plans.json", help="not needed: taken for nnU-Net's users")

    plot = command(commands, "plot", "draw predictions and true masks over the images", PLOT, run_plot)
    plot.add_argument("-i", "--input", type=Path, required=True, help="folder of images")
    plot.add_argument("-p", "--predicted", type=Path, required=True, nargs="+", help="folders of predicted masks")
    plot.add_argument("-r", "--reference", type=Path, help="folder of true masks")
    plot.add_argument("-djfile", type=Path, metavar="dataset.json", help="names of the classes")
    plot.add_argument("-o", "--output", type=Path, required=True, help="folder for NAME.png")
    plot.add_argument("--limit", type=int, help="draw so many cases only")


def run_evaluate(args: argparse.Namespace) -> int:
    """vmamba medseg evaluate"""
    from vmamba.medical.conventions import convention_of, evaluate_by
    from vmamba.medical.evaluate import evaluate, table
    from vmamba.medical.labelset import label_set
    from vmamba.medical.raw import read_dataset_json

    beside = args.predicted / "dataset.json"  # as predict writes it
    source = args.djfile or (beside if beside.is_file() else None)
    labels = label_set(read_dataset_json(source), str(source)) if source else None
    if source == beside:
        print(f"{source}: names the classes, regions and the ignore label (-djfile takes another)")
    progress = not args.no_progress
    count = threads("-np", args.np)
    options = {"labels": labels, "overwrite": args.overwrite, "progress": progress, "threads": count}
    convention = args.convention or convention_of(args.truth)
    score = evaluate if convention == "nnunet" else partial(evaluate_by, convention)
    print(table(score(args.truth, args.predicted, args.output, chill=args.chill, **options)))
    return 0


def run_plot(args: argparse.Namespace) -> int:
    """vmamba medseg plot"""
    from vmamba.medical.labelset import label_set
    from vmamba.medical.overlays import draw_folder
    from vmamba.medical.raw import read_dataset_json

    names = ()
    if args.djfile:
        names = ("background", *label_set(read_dataset_json(args.djfile), str(args.djfile)).names)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: expected at least 1")
    masks = {"truth": args.reference} if args.reference else {}
    masks |= {folder.name: folder for folder in args.predicted}
    written = draw_folder(args.input, masks, args.output, names, limit=args.limit)
    print(f"{args.output}: {len(written)} picture(s)")
    return 0

"""vmamba medseg find-best: which configuration or pair of them to predict with."""

import argparse
from typing import Any

from vmamba.tools.medseg import add_places, add_threads, command, threads

EXAMPLE = """nnU-Net's find_best_configuration: gathers the folds of every trained model, averages every pair (trained
with --npz), takes the best mean Dice, chooses its post-processing, and writes inference_instructions.txt.

examples:
  vmamba medseg find-best 900 --root demo
  vmamba medseg find-best 900 -tr nnUNetTrainerVMUNet nnUNetTrainerUMambaBot -f 0 1 --root demo"""


def add_commands(commands: Any) -> None:
    """Adds ``find-best``."""
    text = "the best configuration or pair of them by cross-validation"
    parser = command(commands, "find-best", text, EXAMPLE, run_find_best)
    parser.add_argument("dataset", metavar="DATASET", help="name or number")
    parser.add_argument("-tr", nargs="+", default=[], metavar="TRAINER", help="of these (default: all trained)")
    parser.add_argument("-c", nargs="+", default=[], metavar="CONFIG", help="of these (default: all trained)")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="name of the plans (default nnUNetPlans)")
    parser.add_argument("-f", nargs="+", default=list("01234"), metavar="FOLD", help="folds (default 0 1 2 3 4)")
    parser.add_argument("--disable_ensembling", action="store_true", help="no pairs")
    parser.add_argument("--no_overwrite", action="store_true", help="keep the masks of pairs that are there already")
    add_threads(parser, "-np", "worked on", default=1)
    add_places(parser)


def run_find_best(args: argparse.Namespace) -> int:
    """vmamba medseg find-best"""
    from vmamba.medical.find_best import INSTRUCTIONS, Manner, find_best, trained_models
    from vmamba.medical.raw import Places, find_dataset

    manner = Manner(not args.no_progress, threads("-np", args.np), not args.no_overwrite)
    places = Places.find(args.root)
    dataset = find_dataset(places, args.dataset)
    results = places.results / dataset.name
    models = trained_models(results, args.tr, args.p, args.c)
    found = find_best(results, dataset, models, args.f, pairs=not args.disable_ensembling, manner=manner)
    for name, dice in sorted(found["all_results"].items(), key=lambda item: -item[1]):
        print(f"{dice:.4f}  {name}")
    print(f"\n{results / INSTRUCTIONS}:\n{(results / INSTRUCTIONS).read_text(encoding='utf-8')}", end="")
    return 0

"""vmamba medseg predict | ensemble | postprocess: from images to masks."""

import argparse
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.medseg import add_model, add_places, add_threads, command, threads

PREDICT = """examples:
  vmamba medseg predict -i imagesTs -o predicted -d 900 -c 2d -f 0 1 --root demo
  vmamba medseg predict -i DIR/images -m runs/first -o predictions --overlay"""
ENSEMBLE = "example:\n  vmamba medseg ensemble -i predicted_2d predicted_3d -o combined"
POSTPROCESS = """examples:
  vmamba medseg postprocess -i predicted -o final -pp RESULTS/crossval_results_folds_0_1_2_3_4/postprocessing.json
  vmamba medseg postprocess -i crossval -ref labelsTr -o final"""


def add_commands(commands: Any) -> None:
    """Adds the three commands."""
    _add_predict(commands)
    mix = command(commands, "ensemble", "average the probabilities of several predictions", ENSEMBLE, run_ensemble)
    mix.add_argument("-i", "--input", type=Path, nargs="+", required=True, help="folders with .npz and masks")
    mix.add_argument("-o", "--output", type=Path, required=True, help="folder for the masks")
    mix.add_argument("--save_npz", "--save-npz", action="store_true", help="also the averages")
    add_threads(mix, "-np", "averaged", default=1)
    mix.add_argument("--overwrite", action="store_true", help="replace masks that exist (default: they are kept)")

    text = "keep the largest component, of all foreground or of a class, where cross-validation gains by it"
    post = command(commands, "postprocess", text, POSTPROCESS, run_postprocess)
    post.add_argument("-i", "--input", type=Path, required=True, help="folder of masks")
    post.add_argument("-o", "--output", type=Path, required=True, help="folder for the masks")
    add_threads(post, "-np", "worked on")
    how = post.add_mutually_exclusive_group(required=True)
    how.add_argument("-pp", type=Path, metavar="postprocessing.json", help="what the cross-validation chose")
    how.add_argument("-ref", type=Path, metavar="GT_DIR", help="choose now, by these true masks of the same names")
    source = "labels and regions, for -ref (default: the one in the folder of -i, if there is one)"
    post.add_argument("-dataset_json", type=Path, metavar="dataset.json", help=source)
    unread = "not needed: taken for nnU-Net's users"
    post.add_argument("-plans_json", type=Path, metavar="plans.json", help=unread)
    post.add_argument("--overwrite", action="store_true", help="replace masks that exist (default: they are kept)")


def _add_predict(commands: Any) -> None:
    silent = ("--disable_progress_bar",)
    parser = command(commands, "predict", "write a mask for every image", PREDICT, run_predict, silent=silent)
    parser.add_argument("-i", "--input", type=Path, nargs="+", required=True, help="images, or folders of them")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the masks")
    parser.add_argument(
        "-m", "--model", type=Path, metavar="RUN", help="run or model folder, or .ckpt; instead of -d -c"
    )
    parser.add_argument("-d", metavar="DATASET", help="name or number of the data set trained on")
    parser.add_argument("-c", metavar="CONFIG", default="3d_fullres", help="2d or 3d_fullres (default)")
    add_model(parser)
    add_places(parser)
    parser.add_argument("-f", nargs="+", default=[], metavar="FOLD", help="folds to average (default: all trained)")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint (default checkpoint_final.pth)")
    parser.add_argument("-step_size", type=float, default=0.5, help="of the windows, in patches (default 0.5)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring")
    parser.add_argument("-num_parts", type=int, default=1, help="share the cases between so many processes")
    parser.add_argument("-part_id", type=int, default=0, help="the number of this process, from 0")
    parser.add_argument(
        "--save-probabilities", "--save_probabilities", action="store_true", help="also NAME.npz, class first"
    )
    parser.add_argument("--overlay", action="store_true", help="also overlays/NAME.png")
    parser.add_argument("--device", "-device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    words = "bf16-mixed, 16-mixed or 32-true (default: bf16-mixed on a GPU that has it)"
    parser.add_argument("--precision", default="auto", metavar="WORD", help=f"of a model folder: {words}")
    ahead = "cases of a model folder that are read and resampled while others are predicted (default 1; 0: in turn)"
    parser.add_argument("-npp", type=int, default=1, metavar="N", help=ahead)
    behind = "and that are written meanwhile; with probabilities that takes longest (default 1; 0: in turn)"
    parser.add_argument("-nps", type=int, default=1, metavar="N", help=behind)
    sums = "keep the sum of a model folder's windows in main memory from the start, not once a GPU's is full"
    parser.add_argument("--not_on_device", action="store_true", help=sums)
    parser.add_argument("--trust", action="store_true", help="run the code that a foreign checkpoint may hold")
    finished = parser.add_mutually_exclusive_group()
    finished.add_argument("--overwrite", action="store_true", help="replace masks that exist (default: they are kept)")
    finished.add_argument("--continue_prediction", action="store_true", help="the default, for nnU-Net's users")


def run_predict(args: argparse.Namespace) -> int:
    """vmamba medseg predict"""
    from vmamba.medical.jobs import trained_folder
    from vmamba.medical.predict import Output, predict
    from vmamba.medical.raw import Places

    if (args.model is None) == (args.d is None):
        raise UserError("predict: expected -m RUN, or -d DATASET -c CONFIG")
    if args.d or (args.model / "plans.json").exists():
        folder = args.model or trained_folder(Places.find(args.root), args.d, args.c, args.tr, args.p)
        return _model_folder(args, folder)
    to = Output(args.save_probabilities, args.overlay, args.overwrite, not args.no_progress)
    written = predict(args.input, args.model, args.output, to=to, device=args.device)
    print(f"{args.output}: {len(written)} mask(s)")
    return 0


def _model_folder(args: argparse.Namespace, folder: Path) -> int:
    from vmamba.device import choose_device
    from vmamba.medical.fold_predict import Wish, load_folds, predict_folder
    from vmamba.medical.model_folder import open_model
    from vmamba.medical.overlays import draw_folder
    from vmamba.medical.window import Window

    if not 0 < args.step_size <= 1:
        raise UserError(f"-step_size {args.step_size:g}: expected a share of the patch, above 0 and up to 1")
    if len(args.input) > 1:
        raise UserError(f"-i: {len(args.input)} inputs; expected one folder of NAME_0000 ... files")
    workers = threads("-npp", args.npp, 0), threads("-nps", args.nps, 0)
    device, model = choose_device(args.device), open_model(folder)
    trained = load_folds(model, args.f, args.chk, device, args.trust)
    print(f"{model.folder.name}: {', '.join(one.name for one in trained)}")
    chosen = {"device": device, "precision": args.precision, "host": args.not_on_device}
    window = Window(args.step_size, not args.disable_tta, **chosen)
    share = args.num_parts, args.part_id
    wish = Wish(args.save_probabilities, args.overwrite, *share, not args.no_progress, *workers)
    written = predict_folder(args.input[0], args.output, model, trained, window, wish)
    if args.overlay:
        names = ["background", *model.labels.names]
        draw_folder(args.input[0], {"prediction": args.output}, args.output / "overlays", names)
    print(f"{args.output}: {len(written)} mask(s) by {len(trained)} network(s)")
    return 0


def run_ensemble(args: argparse.Namespace) -> int:
    """vmamba medseg ensemble"""
    from vmamba.medical.ensemble import ensemble

    options = {"overwrite": args.overwrite, "progress": not args.no_progress, "threads": threads("-np", args.np)}
    written = ensemble(args.input, args.output, keep=args.save_npz, **options)
    print(f"{args.output}: {len(written)} mask(s) from {len(args.input)} predictions")
    return 0


def run_postprocess(args: argparse.Namespace) -> int:
    """vmamba medseg postprocess"""
    from vmamba.medical.postprocess import apply, decide_folders, read_steps

    options = {"progress": not args.no_progress, "threads": threads("-np", args.np)}
    if args.pp:
        steps = read_steps(args.pp)
    else:
        steps = decide_folders(args.ref, args.input, description=args.dataset_json, **options)["steps"]
    written = apply(args.input, args.output, steps, overwrite=args.overwrite, **options)
    what = "; ".join(f"labels {', '.join(map(str, step))}" for step in steps) or "nothing, none helped"
    print(f"{args.output}: {len(written)} mask(s); reduced to the largest component: {what}")
    return 0

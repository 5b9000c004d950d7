"""vmamba medseg benchmark: speed of training, of loading and of prediction on this machine."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.medseg import command

EXAMPLES = """train: iterations of nnU-Net's recipe on patches that are there already, nnU-Net's network beside
feed: Lightning's loop as vmamba medseg train runs it, without loading and with it, and how busy the GPU is
predict: one volume from its file to the mask, by the code of vmamba medseg predict

examples:
  vmamba medseg benchmark train --precision bf16-mixed 32-true --json train.json
  vmamba medseg benchmark feed umamba_bot_3d vmunet
  vmamba medseg benchmark predict umamba_bot_3d vmunet_synapse --volume 200 512 512 --json predict.json"""
NETWORKS = {
    "train": (
        *("umamba_bot_3d", "umamba_enc_3d", "lightm_unet_3d", "hymamba", "umamba_bot_2d", "umamba_enc_2d"),
        *("swin_umamba", "swin_umamba_d", "vmunet", "mhs_unet_4h", "msvm_unet_tiny", "lightm_unet_2d"),
    ),
    "feed": ("umamba_bot_3d", "lightm_unet_3d", "swin_umamba_d", "vmunet"),
    "predict": ("umamba_bot_3d", "vmunet_synapse"),
}


def add_commands(commands: Any) -> None:
    """Adds ``benchmark``."""
    text = "time training, loading and prediction at published sizes"
    parser = command(commands, "benchmark", text, EXAMPLES, run_benchmark)
    parser.add_argument("what", choices=tuple(NETWORKS), help="what is measured")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="of vmamba list (default: one of each kind)")
    parser.add_argument(
        "--precision", nargs="+", default=["auto"], metavar="WORD", help="bf16-mixed, 32-true, 16-mixed"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--patch", type=int, nargs="+", metavar="N", help="instead of the published")
    parser.add_argument("--batch", type=int, metavar="N", help="instead of the published (train, feed)")
    parser.add_argument("--volume", type=int, nargs=3, default=[200, 512, 512], metavar="N", help="z y x, to predict")
    parser.add_argument("--windows", type=int, metavar="N", help="at once, to predict (default: as predict does)")
    parser.add_argument("--no-baseline", action="store_true", help="without nnU-Net's own network (predict)")
    parser.add_argument("--workers", type=int, help="processes that load (feed; default: as in training)")
    parser.add_argument("--repeat", type=int, help="repetitions (default: train 10, feed 100 steps, predict 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row as it is measured")


def run_benchmark(args: argparse.Namespace) -> int:
    """vmamba medseg benchmark"""
    from vmamba.device import choose_device
    from vmamba.medical.benchmark import setups
    from vmamba.medical.window import AUTO, CAST, Window

    device = choose_device(args.device)
    precisions = [Window(device=device, precision=p).precision for p in args.precision]
    if args.what != "predict" and "16-mixed" in precisions:
        raise UserError(f"{args.what} --precision 16-mixed: needs a scaled loss; choose from {AUTO}, {', '.join(CAST)}")
    for name in ("batch", "windows", "repeat"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected at least 1")
    if min(args.volume) < 1 or min(args.patch or [1]) < 1:
        raise UserError("--volume and --patch take sides of at least 1")
    found = setups(args.networks or NETWORKS[args.what], args.patch, args.batch)
    RUNS[args.what](args, found, precisions, device)
    return 0


def _train(args: argparse.Namespace, found: Any, precisions: Sequence[str], device: Any) -> None:
    import torch

    from vmamba.benchmark import Plan, measure
    from vmamba.medical.benchmark_train import KEY, points
    from vmamba.tools.medseg_benchmark_run import TRAIN, run

    torch.backends.cudnn.benchmark = True  # as training has it
    plan = Plan(device, max(args.repeat or 10, 3), warmup=2, seconds=6.0)
    groups = points(found, precisions, device)
    tasks = [([dict(job.facts) for job in jobs], partial(measure, jobs, plan)) for jobs in groups]
    run(TRAIN, KEY, tasks, device, args)


def _feed(args: argparse.Namespace, found: Any, precisions: Sequence[str], device: Any) -> None:
    from vmamba.medical.benchmark_feed import KEY, facts, measure
    from vmamba.medical.train import Hardware
    from vmamba.tools.medseg_benchmark_run import FEED, run

    devices = str(device.index or 0) + "," if device.type == "cuda" else "1"
    hardware = Hardware("gpu" if device.type == "cuda" else "cpu", devices, workers=args.workers, progress=False)
    tasks = []
    for (name, setup), p in product(found.items(), precisions):
        job = name, setup, p, hardware
        tasks.append(([facts(*job)], partial(measure, *job, args.repeat or 100)))
    run(FEED, KEY, tasks, device, args)


def _predict(args: argparse.Namespace, found: Any, precisions: Sequence[str], device: Any) -> None:
    from vmamba.medical.benchmark import baseline
    from vmamba.medical.benchmark_predict import KEY, facts, measure
    from vmamba.medical.window import Window
    from vmamba.tools.medseg_benchmark_run import PREDICT, run

    beside = {} if args.no_baseline else {setup: baseline() for setup in found.values()}
    pairs = [*found.items(), *((name, setup) for setup, name in beside.items())]
    tasks = []
    for (name, setup), p, mirror in product(pairs, precisions, (True, False)):
        window = Window(mirror=mirror, device=device, precision=p, batch=args.windows)
        job = name, setup, args.volume, window
        tasks.append(([facts(*job)], partial(measure, *job, args.repeat or 1)))
    run(PREDICT, KEY, tasks, device, args)


RUNS: dict[str, Callable[..., None]] = {"train": _train, "feed": _feed, "predict": _predict}

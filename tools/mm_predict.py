"""What ``vmamba detect`` and ``vmamba segment`` share: their options, and a run from pictures to files."""

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

from vmamba import __version__
from vmamba.errors import UserError
from vmamba.tools.mm_config import configuration

OUTPUTS = ("overlays", "labels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of both commands."""
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="pictures, folders of them, or patterns as 'a/*.jpg'"
    )
    parser.add_argument(
        "--config", required=True, metavar="CONFIG", help="a configuration of mmengine; its code is run"
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="a file of vmamba train or of the original code, or its address",
    )
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="folder for what is written")
    parser.add_argument("-r", "--recursive", action="store_true", help="also pictures in folders inside a folder")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--overwrite", action="store_true", help="start DIR anew (default: pictures that are finished there are kept)"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings, as model.test_cfg.rcnn.score_thr=0.1",
    )
    parser.set_defaults(launcher="none", work_dir=None)


def run_task(args: argparse.Namespace, scope: str, task: Callable[[Any], Any], settings: Mapping[str, Any]) -> int:
    """Predict and write; 0, or 1 if a picture was left out, or 130 if it was stopped by Ctrl-C.

    Args:
        args: of the command line.
        scope: the toolbox of the network, mmdet or mmseg.
        task: makes the outputs of the network's classes.
        settings: further ones that outputs depend on.

    Raises:
        UserError: OpenMMLab is missing, or the pictures, the configuration, the checkpoint or the folder do not do.
    """
    try:
        cfg = configuration(args)
    except OSError as error:  # a base of the configuration is missing
        raise UserError(f"{args.config}: {error}") from error
    _require(args.command, scope)
    from vmamba.mm.journal import Journal
    from vmamba.mm.network import Network
    from vmamba.mm.pictures import find_pictures
    from vmamba.mm.predict import predict, write_summary
    from vmamba.safety import only_writer

    without = [args.output / name for name in OUTPUTS]
    pictures = find_pictures(args.images, recursive=args.recursive, without=without)
    network = Network(cfg, args.checkpoint, scope, args.device)
    if network.classes.origin == "numbers":
        print("vmamba: neither checkpoint nor configuration names the classes; they are numbered", file=sys.stderr)
    outputs = task(network.classes)
    settings = {"command": args.command, **network.settings, **settings}
    with only_writer(args.output):
        journal = Journal(args.output, settings, outputs.folders, overwrite=args.overwrite)
        summary = predict(network, outputs, pictures, args.output, journal)
        files = {"config": args.config, "checkpoint": args.checkpoint, "device": str(network.device)}
        write_summary(args.output, summary, {"vmamba": __version__, **files, **settings})
    print(_line(args.output, summary, outputs.headline(summary.counts)))
    return 130 if summary.stopped else int(bool(summary.failed))


def _require(command: str, toolbox: str) -> None:
    """UserError unless the toolbox and mmcv's operators can be imported."""
    from vmamba.openmmlab import PARTS, explain

    for name, modules in (("mmcv", (PARTS["mmcv"],)), (toolbox, (f"{toolbox}.models", f"{toolbox}.datasets"))):
        try:
            with redirect_stdout(StringIO()), catch_warnings():  # remarks on packages that are not needed
                simplefilter("ignore")
                for module in modules:
                    import_module(module)
        except Exception as error:  # whatever a broken installation raises
            advice = "make mm in a checkout of vmamba installs it"
            raise UserError(f"vmamba {command} needs {name}: {explain(error)}; {advice}") from error


def _line(folder: Path, summary: Any, headline: str) -> str:
    pictures = f"{summary.pictures} picture{'' if summary.pictures == 1 else 's'}"
    kept = f", of which {summary.kept} kept from before (--overwrite starts anew)" if summary.kept else ""
    failed = f"; {len(summary.failed)} left out" if summary.failed else ""
    stopped = "; stopped: the same command goes on there" if summary.stopped else ""
    return f"{folder}: {pictures}{kept}: {headline}{failed}{stopped}"

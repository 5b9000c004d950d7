"""vmamba test: evaluate a checkpoint on the test data of a configuration of mmengine."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.mm_config import add_arguments, configuration, leave, runner
from vmamba.tools.zoo import add_command


def add_parser(subparsers: Any) -> None:
    """Adds ``test``."""
    parser = add_command(
        subparsers,
        "test",
        "evaluate a checkpoint on the test data of a configuration of mmengine",
        "vmamba test upernet_vmamba_tiny_s1l8_ade20k_160k.py upernet.pth --out predictions.pkl",
    )
    add_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file of vmamba train or of the original code")
    parser.add_argument("--out", metavar="FILE.pkl", help="write the predictions there")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation, as the configuration defines it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba test"""
    cfg = configuration(args)
    if not Path(args.checkpoint).is_file() and "://" not in args.checkpoint:
        raise UserError(f"no checkpoint at {args.checkpoint}")
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.tta:
        _augment(cfg)
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        raise UserError(f"--out writes a pickle, so its name must end in .pkl, got {args.out}")
    runs = runner(cfg)
    if args.out:
        from mmengine.evaluator import DumpResults

        runs.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    runs.test()
    leave()
    return 0


def _augment(cfg: Any) -> None:
    missing = [name for name in ("tta_model", "tta_pipeline") if name not in cfg]
    if missing:
        raise UserError(f"--tta needs {' and '.join(missing)} in the configuration")
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


if __name__ == "__main__":
    from vmamba.tools.cli import main

    sys.exit(main(["test", *sys.argv[1:]]))

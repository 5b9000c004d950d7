"""What ``vmamba train`` and ``vmamba test`` share: the options of OpenMMLab's tools, a configuration, a runner."""

import argparse
import os
from pathlib import Path
from typing import Any

from vmamba.errors import UserError

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that OpenMMLab's train.py and test.py have in common."""
    parser.add_argument("config", metavar="CONFIG", help="a configuration of mmengine, a Python file")
    parser.add_argument("--work-dir", metavar="DIR", help="logs and checkpoints; by default work_dirs/CONFIG")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings, as train_cfg.max_epochs=12"
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none", help="what started the processes")


def configuration(args: argparse.Namespace) -> Any:
    """The configuration of the command line, with its options in it.

    Raises:
        UserError: OpenMMLab is missing or broken, or there is no such file, or it cannot be read.
    """
    from vmamba.openmmlab import explain

    try:
        from mmengine.config import Config, DictAction

        import vmamba.mm  # noqa: F401
    except ImportError as error:
        raise UserError(str(error) if "vmamba.mm" in str(error) else explain(error)) from error
    if not Path(args.config).is_file():
        raise UserError(f"no configuration at {args.config}")
    if args.launcher == "pytorch" and "LOCAL_RANK" not in os.environ:
        raise UserError("--launcher pytorch is for torchrun, which did not start this; take tools/dist_train.sh")
    reader = argparse.ArgumentParser("--cfg-options", add_help=False)
    reader.add_argument("--cfg-options", nargs="+", action=DictAction)
    try:
        cfg = Config.fromfile(args.config)
        if args.cfg_options:
            cfg.merge_from_dict(reader.parse_args(["--cfg-options", *args.cfg_options]).cfg_options)
    except (ImportError, OSError, SyntaxError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{args.config}: {error}") from error
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
    return cfg


def runner(cfg: Any) -> Any:
    """mmengine's runner of a configuration.

    Raises:
        UserError: the toolbox that the configuration is for does not work, or mixed precision lacks a GPU.
    """
    import torch
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from vmamba.openmmlab import SUPPORTED, toolboxes

    scope, found = cfg.get("default_scope", "mmengine"), toolboxes()
    if scope in SUPPORTED and scope not in found:
        raise UserError(f"the configuration is for {scope}, which is not installed; see vmamba doctor")
    for name in {scope, "mmcv"} & found.keys() if scope != "mmengine" else ():
        if found[name].problems:
            raise UserError(f"{name}: {found[name].problems[0]}")
    if "Amp" in str(cfg.get("optim_wrapper", {}).get("type", "")) and not torch.cuda.is_available():
        raise UserError("mixed precision needs a GPU, and PyTorch finds none; leave --amp out")
    if cfg.launcher == "pytorch" and not torch.cuda.is_available():
        _join_on_cpu(cfg)
    _keep_safe(cfg)
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


def leave() -> None:
    """Leave the other processes in good order: threads of a group left to Python's end can abort a process."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _keep_safe(cfg: Any) -> None:
    """Checkpoints that are whole or absent, in place of mmengine's; detectors in every precision, on every device."""
    saver = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    folders = "local" in str(cfg.get("strategy", {}).get("state_dict_cfg", ""))  # FSDP writes a folder of shards
    if saver.get("type") == "CheckpointHook" and not folders:
        saver["type"] = "WholeCheckpointHook"
    hooks = list(cfg.get("custom_hooks") or [])
    if cfg.get("default_scope") == "mmdet" and all(hook["type"] != "DetectorOperatorsHook" for hook in hooks):
        cfg.custom_hooks = [*hooks, {"type": "DetectorOperatorsHook"}]


def _join_on_cpu(cfg: Any) -> None:
    """Join the processes of torchrun on a machine without a GPU, which mmengine would ask for."""
    import torch

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    cfg.setdefault("model_wrapper_cfg", {"type": "MMDistributedDataParallel", "device_ids": None})

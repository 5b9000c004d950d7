"""Checkpoints that survive a full disk or a kill: files appear whole, an old one goes only when the new one is there.

mmengine's hook removes what ``max_keep_ckpts`` and ``save_best`` no longer keep before it writes, and writes in place.
In a configuration: ``default_hooks = dict(checkpoint=dict(type="WholeCheckpointHook", ...))``, with the same options.
"""

import os
import shutil
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from vmamba.errors import UserError
from vmamba.safety import PARTIAL, replacing

BACKEND = "whole_files"
POINTER = "last_checkpoint"  # mmengine's file with the path of the newest checkpoint


class WholeFiles(LocalBackend):
    """Files of this machine: one is written beside its place, then moved; one to be removed stays until ``settle``."""

    def __init__(self) -> None:
        self._removed: list[str] = []

    def put(self, obj: "bytes | memoryview", filepath: "str | Path") -> None:
        """Write a file.

        Raises:
            UserError: it cannot be written; what was there is as it was.
        """
        path = Path(filepath)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial, partial.open("wb") as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{path}: the checkpoint cannot be written ({error.strerror or error}); "
                "the older ones are as they were: make room, then go on with --resume"
            ) from error

    def remove(self, filepath: "str | Path") -> None:
        """Note a file, or the folder of a sharded checkpoint, to be removed."""
        self._removed.append(str(filepath))

    def rmtree(self, dir_path: "str | Path") -> None:
        """As ``remove``."""
        self.remove(dir_path)

    def settle(self) -> None:
        """Remove what was noted."""
        for path in self._removed:
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                Path(path).unlink(missing_ok=True)
        self._removed.clear()


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, whose files are whole or not there.

    Args:
        *args, **kwargs: of ``CheckpointHook``; with ``backend_args`` of another storage it does what that does.

    Raises:
        UserError: a checkpoint cannot be written.
    """

    def __init__(self, *args, **kwargs) -> None:
        kwargs["backend_args"] = kwargs.get("backend_args") or {"backend": BACKEND}
        super().__init__(*args, **kwargs)

    def before_train(self, runner) -> None:
        """Finds the folder; removes what a killed run left half written there."""
        super().before_train(runner)
        self._settle()
        if is_main_process() and isinstance(self.file_backend, WholeFiles):
            for stale in Path(self.out_dir or ".").glob(f"{PARTIAL}*"):
                stale.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        pointer = Path(runner.work_dir, POINTER)
        before = pointer.read_text() if is_main_process() and pointer.is_file() else ""
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        except OSError:  # of the pointer, which mmengine writes in place
            if before:
                pointer.write_text(before)
            raise
        self._settle()

    def _save_best_checkpoint(self, runner, metrics) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._settle()

    def _settle(self) -> None:
        if isinstance(self.file_backend, WholeFiles):
            self.file_backend.settle()


def register() -> None:
    """Let mmengine find the storage by name."""
    register_backend(BACKEND, WholeFiles, force=True)

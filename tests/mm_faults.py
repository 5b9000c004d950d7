"""Accidents that befall a training of mmengine: hooks that a configuration names."""

import errno
import os
import signal

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module(force=True)
class KillWhileSavingHook(Hook):
    """SIGKILL in the midst of writing the checkpoint after an iteration."""

    def __init__(self, after: int):
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Lets the next file that is synchronised be the last."""
        if runner.iter + 1 == self.after:
            os.fsync = kill


def kill(*_) -> None:
    """What a scheduler or a lack of memory does."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(*_) -> None:
    """What a full disk says."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

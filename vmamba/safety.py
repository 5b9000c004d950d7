"""Files appear whole, a folder has one writer, and disks that refuse say so in one line."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vmamba.errors import UserError

LOCK = ".vmamba.lock"
PARTIAL = ".partial-"  # what the names of unfinished files begin with
UNHARMED = "nothing that was there has been changed; what was finished is kept"
SMALLER = "a smaller --batch-size or --patch, or --precision bf16-mixed needs less"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM)
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # of the processes of one training


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the place of ``path`` in one step if the block ends well."""
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")  # the same ending: writers choose the format by it
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Makes ``folder`` and holds it for this process; UserError if another one writes there or it cannot be written."""
    with refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            if all(os.environ.get(name, "0") == "0" for name in RANKS):  # the others come with the first
                lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{folder}: another process writes there; wait for it or give another folder") from error
    try:
        with refusals(folder):
            yield
    finally:
        lock.release()


@contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """Turns an OSError of the system into a UserError that says what it was, about its file or else ``folder``.

    So is a GPU without memory. An OSError without a number does not come from the system, and passes.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of our output has had enough
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(_in_words(error, folder)) from error
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            raise UserError(f"{_first(error)}; {SMALLER}") from error
        if "PytorchStreamWriter" not in str(error):  # what torch.save makes of an OSError
            raise
        raise UserError(_not_written(folder, "the checkpoint could not be finished; is there space left?")) from error


def _in_words(error: OSError, folder: Path) -> str:
    where, reason = error.filename or folder, error.strerror or type(error).__name__
    path = os.fsdecode(where) if not isinstance(where, int) else str(folder)
    if error.errno in FULL or (error.errno in FORBIDDEN and not _hidden(path)):
        return _not_written(path, reason)
    if error.errno in FORBIDDEN:
        return f"{path}: cannot be read ({reason}); change its permissions or copy it"
    return f"{path}: {reason}" if error.filename else f"the system refused: {reason}"


def _first(error: RuntimeError) -> str:
    return str(error).split(". ")[0].splitlines()[0]


def _hidden(path: str) -> bool:
    return os.path.exists(path) and not os.access(path, os.R_OK)


def _not_written(where: object, reason: str) -> str:
    return f"{where}: cannot be written ({reason}); {UNHARMED}"

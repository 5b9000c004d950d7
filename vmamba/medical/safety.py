"""Files appear whole, a folder has one writer, and disks that refuse say so in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vmamba.errors import UserError

LOCK = ".vmamba.lock"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the place of ``path`` in one step if the block ends well."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")  # the same ending: writers choose the format by it
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
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the other processes of one training come with the first
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
    """Turns an OSError (no space, read-only, no permission) into a UserError that names the file or ``folder``."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output has had enough
        raise
    except OSError as error:
        raise _refused(error.filename or folder, error.strerror or str(error) or type(error).__name__) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):  # what torch.save makes of an OSError
            raise
        raise _refused(folder, "the checkpoint could not be finished; is there space left?") from error


def _refused(where: object, reason: str) -> UserError:
    advice = "nothing that was there has been changed; what was finished is kept"
    return UserError(f"{where}: cannot be written ({reason}); {advice}")

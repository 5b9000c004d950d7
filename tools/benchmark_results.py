"""Rows of ``vmamba benchmark`` in a JSON file that grows with every point, and from which a run is taken up again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmamba.benchmark import Job, Row
from vmamba.errors import UserError

HEAD = ("kind", "machine", "setting")


class Results:
    """Rows of one machine and one setting.

    Args:
        head: ``kind``, ``machine`` and ``setting`` of the run, kept in the file beside the rows.
        key: the facts that tell rows apart.
        path: a JSON file to write, or None.
        resume: take up the rows that the file has.

    Raises:
        UserError: the file is there and ``resume`` is not set, or it is of another machine or setting.
    """

    def __init__(self, head: Mapping[str, Any], key: Sequence[str], path: Path | None = None, resume: bool = False):
        self.head, self.key, self.path = head, key, path
        self.rows: list[Row] = []
        if path is None:
            if resume:
                raise UserError("--resume continues a file; name it by --json FILE")
            return
        if not path.parent.is_dir():
            raise UserError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into")
        if path.exists() and not resume:
            raise UserError(f"{path} exists; --resume measures what it lacks, or name another file")
        if path.exists():
            self._take_up(read(path))

    def _take_up(self, found: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(self.head))
        for part in HEAD:
            if found[part] != now[part]:
                raise UserError(f"{self.path} has another {part}: {_difference(found[part], now[part])}")
        self.rows = [row for row in found["rows"] if row["failure"] in (None, "OOM")]

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of ``jobs`` that have no row yet."""
        there = {self._name(row) for row in self.rows}
        return [job for job in jobs if self._name(job.facts) not in there]

    def add(self, rows: Sequence[Row]) -> None:
        """Take up rows, and write the file anew."""
        self.rows.extend(rows)
        if self.path is not None:
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")
            part.replace(self.path)

    def of(self, jobs: Sequence[Job]) -> list[Row]:
        """The rows of ``jobs``, in their order."""
        rows = {self._name(row): row for row in self.rows}
        return [rows[self._name(job.facts)] for job in jobs]

    def _name(self, facts: Mapping[str, Any]) -> tuple:
        return tuple(facts[name] for name in self.key)


def read(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        UserError: it is not there, or is something else.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a file of vmamba benchmark: {error}") from None
    if not isinstance(found, dict) or not {*HEAD, "rows"} <= set(found):
        raise UserError(f"{path} is not a file of vmamba benchmark: it lacks {', '.join(HEAD)} or rows")
    return found


def _difference(found: Any, now: Any) -> str:
    if not isinstance(found, dict) or not isinstance(now, dict):
        return f"{found!r}, this run has {now!r}"
    keys = [key for key in {**found, **now} if found.get(key) != now.get(key)]
    return "; ".join(f"{key} {found.get(key)!r}, this run has {now.get(key)!r}" for key in keys)

"""The journal of an output folder: one line for each finished picture, so that a stopped run goes on where it was."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.safety import replacing

NAME = "journal.jsonl"
FORMAT = 1


class Journal:
    """Records of the pictures whose outputs are finished in ``folder``, by their names.

    The first line of the file has the settings that made them; a line that was cut off by a crash is dropped.

    Args:
        folder: where the outputs are; it must exist.
        settings: what outputs depend on (network, weights, threshold ...), plain values.
        outputs: sub-folders with a ``NAME.png`` for each picture.
        overwrite: remove what the folder's journal lists, and start anew.

    Raises:
        UserError: the folder's outputs were made with other settings, or its journal is of another version.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], outputs: Iterable[str], *, overwrite: bool = False):
        self.path, self.outputs = folder / NAME, [folder / output for output in outputs]
        header, self.records = _read(self.path)
        if overwrite:
            for name in self.records:
                for file in self.files(name):
                    file.unlink(missing_ok=True)
            header, self.records = {}, {}
        changed = [f"{key} {header[key]} (now {new})" for key, new in settings.items() if header.get(key, new) != new]
        if header and (changed or header.get("journal") != FORMAT):
            what = changed[0] if changed else "a journal of another version"
            raise UserError(f"{folder} holds results with {what}; --overwrite starts it anew, or give another folder")
        with replacing(self.path) as partial:
            lines = [{"journal": FORMAT, **settings}, *self.records.values()]
            partial.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")

    def files(self, name: str) -> list[Path]:
        """Where the outputs of a picture are."""
        return [folder / f"{name}.png" for folder in self.outputs]

    def has(self, name: str, source: Path) -> bool:
        """Whether a picture is finished: recorded, unchanged since, and none of its outputs removed.

        Raises:
            UserError: the outputs of that name are another picture's.
        """
        record = self.records.get(name)
        if record is not None and record["file"] != os.path.abspath(source):
            what = f"{self.files(name)[0]} is of {record['file']}, not of {source}"
            raise UserError(f"{what}; --overwrite starts the folder anew, or give another one")
        return (
            record is not None
            and [record["bytes"], record["modified"]] == _state(source)
            and all(file.is_file() for file in self.files(name))
        )

    def add(self, name: str, source: Path, values: Mapping[str, Any]) -> None:
        """Record a picture whose outputs are written; ``id`` numbers pictures from 1 in the order of their coming."""
        known = self.records.get(name)
        number = known["id"] if known else 1 + max((record["id"] for record in self.records.values()), default=0)
        size, modified = _state(source)
        where = {"id": number, "name": name, "file": os.path.abspath(source), "bytes": size, "modified": modified}
        self.records[name] = {**where, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(self.records[name])}\n")
            file.flush()
            os.fsync(file.fileno())


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings, and the last record of each picture."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError):
            lines.append(dict(json.loads(line)))
    header = lines[0] if lines else {}
    return header, {line["name"]: line for line in lines[1:]}

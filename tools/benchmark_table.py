"""Rows of ``vmamba benchmark`` as lines of a Markdown table."""

from collections.abc import Callable, Mapping, Sequence

from vmamba.benchmark import Row

Columns = Mapping[str, Callable[[Row], str]]


def number(value: Callable[[Row], float]) -> Callable[[Row], str]:
    """A column of numbers with three or four digits; a dash where the row has nothing, or None, to make one of."""

    def text(row: Row) -> str:
        try:
            found = value(row)
        except (KeyError, TypeError):
            return "-"
        return f"{found:.0f}" if found >= 1e4 else f"{found:.{4 if found >= 1 else 3}g}"

    return text


def fact(name: str) -> Callable[[Row], str]:
    """A column of what identifies a row."""
    return lambda row: str(row[name])


SHARED: Columns = {
    "ratio": number(lambda row: row["ratio"]),
    "peak GiB": number(lambda row: row["peak_bytes"] / 2**30),
    "moved GB": number(lambda row: row["moved_bytes"] / 1e9),
    "failure": lambda row: row["failure"] or "",
}
MODELS: Columns = {
    "network": fact("name"),
    "task": fact("task"),
    "size": fact("size"),
    "batch": fact("batch"),
    "ms": number(lambda row: row["ms"]),
    "img/s": number(lambda row: 1e3 * row["batch"] / row["ms"]),
    **SHARED,
}
OPERATORS: Columns = {
    "operator": lambda row: f"{row['operator']} ({row['letters']})",
    "case": fact("case"),
    "numbers": fact("numbers"),
    "task": fact("task"),
    "by": fact("name"),
    "ms": number(lambda row: row["ms"]),
    "GB/s": number(lambda row: row["moved_bytes"] / row["ms"] / 1e6),
    **SHARED,
}
WORDS = ("network", "task", "operator", "case", "numbers", "by", "failure")  # columns that are aligned to the left


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows of one point with ``ratio``: time per item of the batch, relative to the first row that has a time."""
    timed = [row["ms"] / row.get("batch", 1) for row in rows if "ms" in row]
    return [{**row, "ratio": row["ms"] / row.get("batch", 1) / timed[0]} if "ms" in row else dict(row) for row in rows]


class Table:
    """A table whose lines can be printed as rows come; ``known`` are the facts of all of them, for the widths."""

    def __init__(self, columns: Columns, known: Sequence[Row]):
        self.columns = columns
        self.widths = [self._width(title, known) for title in columns]

    def header(self) -> str:
        """Titles, and the rule below them."""
        rule = [
            "-" * width if title in WORDS else "-" * (width - 1) + ":"
            for title, width in zip(self.columns, self.widths, strict=True)
        ]
        return f"{self._line(list(self.columns))}\n{self._line(rule)}"

    def line(self, row: Row) -> str:
        """One row."""
        return self._line([column(row) for column in self.columns.values()])

    def _width(self, title: str, known: Sequence[Row]) -> int:
        if title not in WORDS:
            return max(len(title), 7)
        texts = [self.columns[title]({"failure": None, **row}) for row in known]
        return max(len(text) for text in (title, *texts))

    def _line(self, cells: Sequence[str]) -> str:
        sides = ["<" if title in WORDS else ">" for title in self.columns]
        padded = [f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, self.widths, strict=True)]
        return f"| {' | '.join(padded)} |"

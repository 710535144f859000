"""Figures of a run as tables of text: metrics.csv and evaluation.csv in its directory."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from trainer.files.safe_files import open_inside, replace_inside
from trainer.logs.jsonl import MetricsRow
from trainer.logs.loggers.base import (
    Logger,
    RunEnd,
    RunStart,
    flat,
    is_dropped,
    rows_before,
)

OWN_KEYS = ("step", "name", "value", "part", "chance")  # of evaluation.csv; cells are tables


class CsvTable:
    """A file of rows under a header, appended and flushed row by row.

    A row with a new column rewrites the file, because a header stands at the beginning.

    Args:
        directory: that the file lies in.
        name: of the file.
        separator: between two cells.
        rows: that the file begins with; what was there is replaced.
    """

    def __init__(
        self, directory: Path, name: str, separator: str, rows: Sequence[Mapping[str, Any]]
    ):
        self.directory = directory
        self.name = name
        self.separator = separator
        self.columns: list[str] = []
        self.file: TextIO | None = None
        self._rewrite(rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row."""
        if any(column not in self.columns for column in row):
            with open(self.directory / self.name, encoding="utf-8", newline="") as file:
                before = list(csv.DictReader(file, delimiter=self.separator))
            self._rewrite([*before, row])
            return
        assert self.file is not None, "closed already"
        self.file.write(self._text([row]))
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.close()
        for row in rows:
            self.columns += [column for column in row if column not in self.columns]
        head = self._text([dict(zip(self.columns, self.columns))]) if self.columns else ""
        replace_inside(self.directory, self.name, head + self._text(rows))
        handle = open_inside(self.directory, self.name, os.O_WRONLY | os.O_APPEND)
        self.file = open(handle, "a", encoding="utf-8", newline="")  # noqa: SIM115

    def _text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(
            text, self.columns, restval="", delimiter=self.separator, lineterminator="\n"
        )
        writer.writerows(rows)
        return text.getvalue()


class Csv(Logger):
    """Writes metrics.csv and evaluation.csv; a run that goes on writes both anew from the record.

    Args:
        separator: between two cells: one character, as ";" for a spreadsheet of some countries.
    """

    def __init__(self, separator: str = ","):
        if separator in '"\r\n' or len(separator) != 1:
            raise ValueError(
                f"separator={separator!r}: one character, and neither a quotation mark nor a line"
                " break; use a comma or a semicolon"
            )
        self.separator = separator
        self.directory: Path | None = None

    def open(self, run: RunStart) -> None:
        """Writes the rows that the run has so far."""
        self.directory = run.directory
        rows = [flat(row) for row in rows_before(run)]
        self.metrics = CsvTable(run.directory, "metrics.csv", self.separator, rows)
        self.start = run
        self._open_evaluations(run.evaluations)

    def _open_evaluations(self, records: Sequence[Mapping[str, Any]]) -> None:
        rows = [_own(record) for record in records]
        self.evaluations = CsvTable(self.start.directory, "evaluation.csv", self.separator, rows)

    def step(self, row: MetricsRow) -> None:
        """Appends the row of a step."""
        self.metrics.add(flat(row))

    def evaluation(self, step: int, name: str, value: float, made_of: Mapping[str, Any]) -> None:
        """Appends a value of an evaluation."""
        self.evaluations.add(_own({"step": step, "name": name, "value": value, **made_of}))

    def drop_evaluation(self, step: int, parts: Sequence[str]) -> None:
        """Writes evaluation.csv anew without those rows."""
        self.evaluations.close()
        self._open_evaluations(
            [row for row in self.start.evaluations if not is_dropped(row, step, parts)]
        )

    def close(self, end: RunEnd) -> None:
        """Closes both files."""
        self.metrics.close()
        self.evaluations.close()

    @property
    def place(self) -> str | None:
        """The path of metrics.csv."""
        return None if self.directory is None else str(self.directory / "metrics.csv")


def _own(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the cells of a row of evaluation.jsonl, in one order."""
    return {key: record[key] for key in OWN_KEYS if record.get(key) is not None}

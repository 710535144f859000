"""Rows of a run on disk, an object a line: metrics.jsonl and evaluation.jsonl.

Evaluations have rows {"step", "name", "value"} and whatever the value is made of, for example
`by_position`. Rows of a named evaluation also have `part`, its name; `chance`, what a model that
knows nothing would get; `cells`, what the value is made of; and the last of a step has `done`.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from trainer.files.limited_reader import Unreadable, json_value, lines
from trainer.files.safe_files import open_inside, replace_inside

BESIDE = (
    "auxiliary",
    "statistics",
    "skipped",
)  # parts of a row that are dictionaries, or not there
METRICS = "metrics.jsonl"
EVALUATION = "evaluation.jsonl"
FIGURES = ("loss", "tokens", "tokens_per_second", "step_seconds", "peak_memory_bytes", "value")


class MetricsRow(NamedTuple):
    """One line of metrics.jsonl.

    step counts from 1; loss in nats per token, the language loss alone, None where nothing was
    predicted; tokens trained on since the beginning; grad_norm before clipping; peak_memory_bytes
    of the fullest rank; mfu a share of 1 (trainer/logs/meters.py), None where the peak of the
    device is not known; auxiliary: losses of layers beside the language loss; statistics: figures
    of layers, "layer/figure" and their mean "figure"; skipped: why the step was not taken, the
    cursor of its batch and the rows whose loss is not finite; stage: its number from 1 on, of a run
    in stages. They are left out where there are none.
    """

    step: int
    loss: float | None
    tokens: int
    tokens_per_second: float
    step_seconds: float
    grad_norm: float
    learning_rate: float
    peak_memory_bytes: int
    mfu: float | None
    auxiliary: dict[str, float] | None = None
    statistics: dict[str, float] | None = None
    skipped: dict[str, Any] | None = None
    stage: int | None = None


class Lines:
    """A file of JSON lines, appended and flushed line by line.

    Args:
        path: made when missing. A last line that a killed run left half-written is dropped on
            opening.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        self.file.close()
        if self.path.exists() and not _ends_well(self.path):
            _rewrite(self.path, list(read(self.path)))
        self._open()

    def _open(self) -> None:
        handle = open_inside(
            self.path.parent, self.path.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        self.file = open(handle, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. NaN and infinities are written as null, for JSON has no such numbers."""
        self.file.write(json.dumps(_finite(row), allow_nan=False) + "\n")

    def truncate_after(self, step: int) -> int:
        """Drop rows of later steps (a run resumed from `step` writes them again); how many were
        dropped."""
        rows = list(read(self.path))
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            self._replace(kept)
        return len(rows) - len(kept)

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        self.file.close()
        _rewrite(self.path, rows)
        self._open()

    def close(self) -> None:
        """Flush to the disk."""
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()


class Metrics(Lines):
    """metrics.jsonl of a run directory."""

    def __init__(self, directory: Path | str):
        super().__init__(Path(directory) / METRICS)

    def add(self, row: MetricsRow) -> None:
        """Append the row of a step."""
        self.write(
            {
                key: value
                for key, value in row._asdict().items()
                if value is not None or key not in (*BESIDE, "stage")
            }
        )


class Evaluations(Lines):
    """evaluation.jsonl of a run directory."""

    def __init__(self, directory: Path | str):
        super().__init__(Path(directory) / EVALUATION)

    def add(self, step: int, name: str, value: float, **made_of: Any) -> None:
        """Append one value and what it is made of (JSON)."""
        self.write({"step": step, "name": name, "value": value, **made_of})

    def drop(self, step: int, parts: Sequence[str]) -> None:
        """Removes what is written of some parts of an evaluation; a row without a part is of the
        held-out loss."""
        rows = list(read(self.path))
        remaining = []
        for row in rows:
            if row["step"] != step or row.get("part", "held_out") not in parts:
                remaining.append(row)
        if len(remaining) < len(rows):
            self._replace(remaining)


def read(path: Path | str) -> Iterator[dict[str, Any]]:
    """The rows of a file, without a last line that is half-written; nothing where there is no file.

    Raises:
        ValueError: a line before the last is no JSON object with a step.
    """
    place = Path(path)
    if not os.path.lexists(place):
        return
    with open(open_inside(place.parent, place.name, os.O_RDONLY), "rb") as file:
        for number, (line, length) in enumerate(lines(file), 1):
            try:
                row = json_value(line, "it") if length == len(line) else None
            except Unreadable:
                row = None
            if not line.endswith(b"\n") and length == len(line):
                return
            if not _is_row(row):
                raise ValueError(
                    f"line {number} of {path} is no JSON object with a step; mend or remove that"
                    " line"
                )
            yield row


def _is_row(row: Any) -> TypeGuard[dict[str, Any]]:
    """Says of a value whether whoever reads rows can count on it: a whole step, and numbers where
    figures are."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    if "value" in row and not isinstance(row.get("name"), str):
        return False
    return all(row.get(name) is None or type(row[name]) in (int, float) for name in FIGURES)


def _ends_well(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put a new file in the place of the old by one rename: a kill leaves the old or the new."""
    replace_inside(path.parent, path.name, "".join(json.dumps(row) + "\n" for row in rows))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

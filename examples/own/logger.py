"""A logger of one's own, beside the usual ones:

python -m trainer logger.diary._target_=examples.own.logger.Diary logger.diary.every=10
"""

from collections.abc import Mapping, Sequence
from typing import Any

from models.ranges import Count
from trainer.files.safe_files import replace_inside
from trainer.logs.jsonl import MetricsRow
from trainer.logs.loggers.base import Logger, RunEnd, RunStart, is_dropped, rows_before

FILE = "diary.txt"


class Diary(Logger):
    """Writes diary.txt in the run directory: a line for every so many steps and each evaluation.

    Args:
        every: steps between two lines.
    """

    def __init__(self, every: Count = 10):
        self.every = every

    def open(self, run: RunStart) -> None:
        """Writes the lines that the run has so far; those of steps taken again come again."""
        self.run = run
        self.evaluations = list(run.evaluations)
        self._begin()

    def step(self, row: MetricsRow) -> None:
        """Adds the loss of a step."""
        if row.step % self.every == 0 and row.loss is not None:
            self._add(f"step {row.step}: loss {row.loss:.4f}")

    def evaluation(self, step: int, name: str, value: float, made_of: Mapping[str, Any]) -> None:
        """Adds a value of an evaluation."""
        self._add(f"step {step}: {name} {value:.4f}")

    def drop_evaluation(self, step: int, parts: Sequence[str]) -> None:
        """Begins anew without those values, which are computed again."""
        self.evaluations = [
            record for record in self.evaluations if not is_dropped(record, step, parts)
        ]
        self._begin()

    def close(self, end: RunEnd) -> None:
        """Adds how the run ended, or paused."""
        outcome = "failed" if end.failed else "closed"
        self._add(f"{self.run.name} {outcome}")

    @property
    def place(self) -> str | None:
        """The path of the file, for the last screen."""
        return str(self.run.directory / FILE)

    def _begin(self) -> None:
        replace_inside(self.run.directory, FILE, "")
        for row in rows_before(self.run):
            self.step(row)
        for record in self.evaluations:
            self.evaluation(record["step"], record["name"], record["value"], record)

    def _add(self, line: str) -> None:
        with (self.run.directory / FILE).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

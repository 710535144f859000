"""A logger behind a guard: whatever it does, the run goes on, and soon."""

import threading
from collections.abc import Callable, Mapping, Sequence
from queue import Full, Queue
from typing import Any

from trainer.logs.jsonl import MetricsRow
from trainer.logs.loggers.base import Logger, RunEnd, RunStart
from trainer.logs.redact import redacted

MOST_WAITING = 50_000  # calls; a service that far behind is gone
FINISH_S = 30.0  # for what waits at the end of the run


class GuardedLogger:
    """Calls a logger, in order, and never again after its first error.

    Args:
        name: of the logger, its key below `logger.`.
        logger: that is called.
        say: takes a line for the user; called on the thread of the run alone.
    """

    def __init__(self, name: str, logger: Logger, say: Callable[[str], None]):
        self.name = name
        self.logger = logger
        self.say = say
        self.lost = False
        self.trouble: Exception | None = None
        self.waiting: Queue[tuple[Callable[..., None], tuple[Any, ...]] | None] = Queue(
            MOST_WAITING
        )
        self.thread: threading.Thread | None = None

    def open(self, run: RunStart) -> None:
        """Opens the logger, on its thread where it has one."""
        if self.logger.background:
            self.thread = threading.Thread(
                target=self._work, name=f"logger {self.name}", daemon=True
            )
            self.thread.start()
        self._call(self.logger.open, run)

    def step(self, row: MetricsRow) -> None:
        """Passes on the row of a step."""
        self._call(self.logger.step, row)

    def evaluation(self, step: int, name: str, value: float, made_of: Mapping[str, Any]) -> None:
        """Passes on a value of an evaluation."""
        self._call(self.logger.evaluation, step, name, value, made_of)

    def drop_evaluation(self, step: int, parts: Sequence[str]) -> None:
        """Passes on that values of a step come again."""
        self._call(self.logger.drop_evaluation, step, parts)

    def close(self, end: RunEnd) -> None:
        """Closes the logger, and waits for what is left to be written, but not for ever."""
        self._call(self.logger.close, end)
        if self.thread is None:
            return
        if not self.lost:
            self.waiting.put(None)
        wait_s = FINISH_S if end.wait_s is None else end.wait_s
        self.thread.join(wait_s)
        if self.thread.is_alive() and not self.lost:
            self.lost = True
            self.say(
                f"{self.name}: not done within {wait_s:g} s, and not waited for longer;"
                " metrics.jsonl has everything"
            )
        self._report()

    @property
    def place(self) -> str | None:
        """Address or path of what was logged; None after an error."""
        return None if self.lost else self.logger.place

    def _call(self, method: Callable[..., None], *arguments: Any) -> None:
        self._report()
        if self.lost:
            return
        if self.thread is None:
            try:
                method(*arguments)
            except Exception as error:
                self.trouble = error
                self._report()
            return
        try:
            self.waiting.put_nowait((method, arguments))
        except Full:
            self.trouble = TimeoutError(f"{MOST_WAITING} rows behind")
            self._report()

    def _report(self) -> None:
        """Says the first error, once; later ones follow from it."""
        if self.trouble is None or self.lost:
            return
        self.lost = True
        self.say(
            f"{self.name}: switched off for the rest of this run ({_brief(self.trouble)});"
            " metrics.jsonl has everything"
        )

    def _work(self) -> None:
        while (item := self.waiting.get()) is not None:
            method, arguments = item
            try:
                method(*arguments)
            except Exception as error:
                self.trouble = error
                return


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    first = redacted(lines[0])[:200] if lines else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__

"""Output for the user while a run goes on.

Three styles show the same facts: a progress bar with lines above it (rich), plain lines, and JSON
objects, one a line, for programs. Step lines come every few seconds.
"""

import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console as Terminal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from trainer.logs.jsonl import EVALUATION, METRICS, MetricsRow
from trainer.logs.streams import plain

INTERVAL_S = 5.0
ConsoleStyle = Literal["plain", "rich", "json"]
Level = Literal["info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("info", "warning", "error")


def count(number: float) -> str:
    """Formats a number for people: 950, 12.3k, 4.56M."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Formats seconds for people: 0:05, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """Prints for the whole run; made on rank 0, and silent on the others.

    Args:
        steps: the last step's number.
        first: the step that the run goes on from; 0 at the very beginning.
        speaks: whether this rank prints at all.
        file: where to.
        style: of the output; None = rich on a terminal, plain elsewhere.
        level: the least that is printed: info = all, warning = warnings and the last screen, error
            = nothing, for what ends a run is printed by its launcher.
    """

    def __init__(
        self,
        steps: int,
        *,
        first: int = 0,
        speaks: bool = True,
        file: TextIO | None = None,
        style: ConsoleStyle | None = None,
        level: Level = "info",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.steps = steps
        self.first = first
        self.speaks = speaks
        self.level = level
        self.clock = clock
        self.file = (
            file or sys.stdout or io.StringIO()
        )  # there is none where it was closed before we began
        self.begin = self.last = clock()
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.style = style or ("rich" if _is_terminal(self.file) else "plain")
        if speaks and self.style == "rich" and self._shows("info"):
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[told]}"),
                TimeRemainingColumn(compact=True),
                console=Terminal(file=self.file, force_terminal=True),
                expand=True,
            )
            self.task = self.bar.add_task("", total=steps, completed=first, told="")

    def say(self, text: str, level: Level = "info") -> None:
        """Prints one or more lines above the bar.

        An output that fails is not used again, and the run goes on.
        """
        self._show(text, {"event": "line", "level": level, "text": text}, level)

    def warn(self, text: str) -> None:
        """Prints lines that a quiet console shows as well."""
        self.say(text, "warning")

    def _shows(self, level: Level) -> bool:
        return self.speaks and LEVELS.index(level) >= LEVELS.index(self.level)

    def _show(self, text: str, facts: dict[str, Any], level: Level) -> None:
        """Prints a text, or under style=json the facts that it states."""
        if not self._shows(level):
            return
        text = json.dumps(facts) if self.style == "json" else plain(text)
        try:
            self._print(text)
        except UnicodeEncodeError as error:
            self._print(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError):
            self.speaks = False

    def _print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.file, flush=True)

    def go_on_from(self, step: int) -> None:
        """Continues the count after `step` earlier steps; time counts from now."""
        self.first = step
        self.begin = self.clock()
        if self.bar is not None:
            self.bar.reset(self.task, total=self.steps, completed=step, told="")

    def step(self, row: MetricsRow) -> None:
        """Shows a finished step.

        Without a terminal the first and the last step always print, others every few seconds.
        """
        if not self._shows("info"):
            return
        loss = "nothing to predict" if row.loss is None else f"loss {row.loss:.4f}"
        told = f"{loss}  {count(row.tokens_per_second)} tokens/s"
        now = self.clock()
        if self.bar is not None:
            with self._unharmed():
                self.bar.start()
                self.bar.update(self.task, completed=row.step, told=told)
                if row.step == self.steps:
                    self.bar.stop()
            return
        if row.step in (self.first + 1, self.steps) or now - self.last >= INTERVAL_S:
            self.last = now
            width = len(str(self.steps))
            left = (now - self.begin) / (row.step - self.first) * (self.steps - row.step)
            self._show(
                f"step {row.step:{width}d}/{self.steps}  {told}  {duration(left)} left",
                {
                    "event": "step",
                    "step": row.step,
                    "steps": self.steps,
                    "loss": row.loss,
                    "tokens_per_second": row.tokens_per_second,
                    "seconds_left": round(left, 1),
                },
                "info",
            )

    def close(self) -> None:
        """Restores the terminal; may be called twice."""
        if self.bar is not None:
            with self._unharmed():
                self.bar.stop()

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """Stops all output when the terminal fails, so that the run goes on."""
        try:
            yield
        except (OSError, ValueError):
            self.speaks = False

    def finish(
        self,
        directory: Path,
        *,
        stopped: str | None = None,
        owed: Sequence[str] = (),
        broken: Sequence[str] = (),
        wandb: str | None = None,
        places: Sequence[tuple[str, str]] = (),
        more: Sequence[str] = (),
    ) -> None:
        """Prints the last screen: files of the run, and commands to try next.

        Args:
            directory: of the run; only files that exist and are not empty are listed.
            stopped: why the run ended before its last step, or None.
            owed: work that was due and is not done, which the same command does.
            broken: work that was tried and failed.
            wandb: address of the W&B run, or the directory of an offline run.
            places: further loggers and where each wrote.
            more: commands to try, before ours.
        """
        self.close()
        found = _files_of(directory)
        if wandb:
            found.append(("W&B", wandb))
        found += places
        head = f"stopped: {stopped}" if stopped else "finished"
        if not stopped and owed:
            head = "trained to the last step, but not evaluated,"
        lines = ["", f"{head} after {duration(self.clock() - self.begin)}; {directory} holds"]
        lines += [f"  {name:<11} {path}" for name, path in found]
        if broken:
            lines.append(f"failed: {', '.join(broken)}; the reasons are above")
        if owed:
            lines.append(f"owed: {', '.join(owed)}; the same command does that")
        run = shlex.quote(str(directory))
        next_ = [*more]
        if stopped or owed:
            next_ = [
                f"python -m trainer run_dir={run} ...   with the same settings goes on from there",
                *next_,
            ]
        if wandb and Path(wandb).is_dir():
            next_.append(f"wandb sync {shlex.quote(wandb)}")
        if next_:
            lines += ["try next", *(f"  {command}" for command in next_)]
        facts = {
            "event": "end",
            "outcome": head.removesuffix(","),
            "seconds": round(self.clock() - self.begin, 1),
            "run_dir": str(directory),
            "found": found,
            "failed": list(broken),
            "owed": list(owed),
            "next": next_,
        }
        self._show("\n".join(lines), facts, "warning")


def _files_of(directory: Path) -> list[tuple[str, str]]:
    """Returns what a run directory holds: (kind, path) of what is not empty."""
    checkpoints = sorted(
        path for path in (directory / "checkpoints").glob("step_*") if path.is_dir()
    )
    plots = sorted((directory / "report").glob("*.png"))
    places = [
        ("metrics", [directory / METRICS]),
        ("evaluation", [directory / EVALUATION]),
        ("checkpoint", checkpoints[-1:]),
        ("sample", [directory / "sample.txt"]),
        ("plots", plots),
    ]
    return [(name, str(path)) for name, paths in places for path in paths if _holds_something(path)]


def _holds_something(path: Path) -> bool:
    """Reports that a path is a folder, or a file that is not empty."""
    return path.is_dir() or (path.is_file() and path.stat().st_size > 0)


def _is_terminal(file: TextIO) -> bool:
    try:
        return file.isatty()
    except (OSError, ValueError):
        return False

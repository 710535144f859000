"""Starts the steps, gives each its turn and its seconds, and writes down what they say."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from scripts.gpu_checks.one_step import GO
from scripts.gpu_checks.report import markdown
from scripts.gpu_checks.schedule import FEWEST_S, STEPS, Step, seconds_for

ENDING_S = 6.0  # of the whole limit, for the last step to be stopped and the table to be written
GRACE_S = 4.0  # that a step may take longer than it was given


class Conductor:
    """All steps of a check.

    Args:
        steps: in their order.
        out: folder of the files; made where it is missing.
        limit: seconds for everything.
        dry: whether tiny sizes on the CPU stand in for the card.
    """

    def __init__(self, steps: list[Step], out: Path, limit: float, *, dry: bool):
        self.began = time.monotonic()
        self.steps = steps
        self.limit = limit
        self.dry = dry
        out.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self.told: queue.Queue[tuple[str, dict[str, Any] | None]] = queue.Queue()
        self.lines = (out / "gpu_check.jsonl").open("w", encoding="utf-8")
        self.log = (out / "gpu_check.log").open("w", encoding="utf-8")
        self.page = out / "gpu_check.md"
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def run(self) -> int:
        """Runs every step; returns the number of those that did not pass."""
        for step in self.steps:
            self.start(step)
        waiting = list(self.steps)
        try:
            while waiting:
                turn = [step for step in waiting if step.together] or waiting[:1]
                self.take_turn(turn, seconds_for(waiting, self.left()))
                waiting = [step for step in waiting if step not in turn]
                self.page.write_text(markdown(self.rows, self.steps), encoding="utf-8")
        finally:
            for name in self.processes:
                self.stop(name)
        outcomes = {row["step"]: row["outcome"] for row in self.rows if "outcome" in row}
        return sum(outcomes.get(step.name) != "passed" for step in self.steps)

    def left(self) -> float:
        """Returns the seconds that are left for steps."""
        return self.limit - ENDING_S - (time.monotonic() - self.began)

    def start(self, step: Step) -> None:
        """Starts the process of a step, which prepares itself."""
        process = subprocess.Popen(
            self.command(step),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A signal then reaches the processes that the step starts too.
            start_new_session=True,
        )
        self.processes[step.name] = process
        assert process.stdout is not None and process.stderr is not None
        for stream, rows in ((process.stdout, True), (process.stderr, False)):
            reader = threading.Thread(
                target=self.listen, args=(step.name, stream, rows), daemon=True
            )
            reader.start()

    def command(self, step: Step) -> list[str]:
        """Returns the words that start a step."""
        words = [sys.executable, "-u", "-m", "scripts.gpu_checks", step.name]
        return [*words, "dry"] if self.dry else words

    def listen(self, name: str, stream: IO[str], rows: bool) -> None:
        """Reads one stream of a step: rows to the queue, everything else to the log."""
        for line in stream:
            row = as_row(line) if rows else None
            if row is None:
                self.log.write(f"{name}: {line}")
                self.log.flush()
            else:
                self.told.put((name, row))
        if rows:
            self.told.put((name, None))

    def take_turn(self, turn: list[Step], seconds: float) -> None:
        """Lets some steps run for so many seconds."""
        began = time.monotonic()
        running = {step.name for step in turn}
        for step in turn:
            if self.has_ended(step.name):
                running.discard(step.name)
            elif seconds < FEWEST_S:
                self.note(step.name, {"outcome": "not begun"})
                running.discard(step.name)
            else:
                self.say(step.name, f"{GO} {seconds:.1f}")
        for name, row in self.rows_until(began + seconds + GRACE_S, running):
            if row is None:
                running.discard(name)
                self.end(name)
            else:
                self.note(name, row)
        for name in sorted(running):
            self.note(name, {"outcome": "cut off", "seconds": round(time.monotonic() - began, 1)})
        for step in turn:
            self.stop(step.name)

    def rows_until(
        self, deadline: float, running: set[str]
    ) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Yields what the steps say until all of these have ended or time is over."""
        while running and (left := deadline - time.monotonic()) > 0:
            try:
                name, row = self.told.get(timeout=left)
            except queue.Empty:
                return
            if row is None and name not in running:
                self.end(name)
                continue
            yield name, row

    def end(self, name: str) -> None:
        """Notes how a step ended, where it did not say so itself."""
        if self.has_ended(name):
            return
        code = self.processes[name].wait()
        ended = [row for row in self.rows if row["step"] == name and "ended" in row]
        outcome = "passed" if code == 0 and ended else "failed"
        if not ended:
            outcome = f"ended by itself, status {code}"
        seconds = ended[-1]["seconds"] if ended else 0.0
        self.note(name, {"outcome": outcome, "seconds": seconds})

    def has_ended(self, name: str) -> bool:
        """Tells whether it is known how a step ended."""
        return any(row["step"] == name and "outcome" in row for row in self.rows)

    def note(self, name: str, row: dict[str, Any]) -> None:
        """Writes a row down, and shows it."""
        row = {"step": name, **row}
        self.rows.append(row)
        self.lines.write(json.dumps(row) + "\n")
        self.lines.flush()
        clock = f"{time.monotonic() - self.began:6.1f} s"
        print(f"{clock} {json.dumps(row)[:400]}", flush=True)

    def say(self, name: str, line: str) -> None:
        """Tells a step something; one that is gone does not hear it."""
        stream = self.processes[name].stdin
        assert stream is not None
        with suppress(OSError):
            stream.write(line + "\n")
            stream.flush()

    def stop(self, name: str) -> None:
        """Ends a step and all that it started."""
        process = self.processes[name]
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def as_row(line: str) -> dict[str, Any] | None:
    """Returns the row that a line is, or None."""
    if not line.startswith("{"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def conduct(out: Path, limit: float, only: list[str], *, dry: bool) -> int:
    """Runs the steps; returns the number of those that did not pass.

    Args:
        out: folder of gpu_check.jsonl, gpu_check.md and gpu_check.log.
        limit: seconds for everything.
        only: names of steps; none: all of them.
        dry: whether tiny sizes on the CPU stand in for the card.
    """
    # Whoever ends this process ends the steps too, which are sessions of their own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    steps = [step for step in STEPS if not only or step.name in only]
    return Conductor(steps, out, limit, dry=dry).run()

"""Runs commands side by side, as many as the machines have ranks for.

A signal stops them all; each of them may save first.
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from trainer.files.safe_files import open_inside
from trainer.launch.exit_report import SAVED, handling
from trainer.sweep.machines import JobSlots, Slots

POLL_S = 1.0


@dataclass(frozen=True)
class ProcessTask:
    """A command to run.

    Attributes:
        command: program and arguments.
        ranks: that it starts.
        output: file that its output is appended to.
        remote: the same on another machine, where the number of this process means nothing.
    """

    command: Sequence[str]
    ranks: int
    output: Path
    remote: Sequence[str] = ()


@dataclass(frozen=True)
class FinishedProcess:
    """Result of a command.

    Attributes:
        code: exit status.
        seconds: that it ran.
        stopped: the pool stopped it after a signal.
        lost: the pool stopped it because it was losing.
    """

    code: int
    seconds: float
    stopped: bool = False
    lost: bool = False


class ProcessPool:
    """Runs tasks side by side in order; a smaller task may pass a larger one that has no room yet.

    Args:
        slots: for the ranks of all tasks.
        began: receives the number of a task that starts.
        ended: receives its number and result.
        losing: called every POLL_S with the numbers of the running tasks; returns those that are
            to be stopped, which may save first.
    """

    def __init__(
        self,
        slots: Slots,
        began: Callable[[int], None],
        ended: Callable[[int, FinishedProcess], None],
        losing: Callable[[Collection[int]], Iterable[int]] | None = None,
    ):
        self.slots = slots
        self.began = began
        self.ended = ended
        self.losing = losing
        self.lost: set[int] = set()
        self.events: SimpleQueue[Any] = (
            SimpleQueue()
        )  # the numbers of tasks that ended, and signals
        self.running: dict[int, tuple[subprocess.Popen[bytes], float, JobSlots]] = {}

    def run(self, tasks: dict[int, ProcessTask]) -> signal.Signals | None:
        """Runs all tasks, by number; returns the signal that stopped them early, or None.

        SIGTERM, SIGINT, SIGHUP and SIGQUIT send SIGTERM to every running task and start no other;
        a second SIGINT kills the tasks.
        """
        waiting = dict(tasks)
        heard = []
        with self._listening(), self._none_left():
            while waiting or self.running:
                for number in [] if heard else [*waiting]:
                    if self.slots.fit(waiting[number].ranks):
                        self._start(number, waiting.pop(number))
                event = self._next_event()
                if event is None:
                    self._stop_losing()
                elif isinstance(event, signal.Signals):
                    self._stop(event, kill=signal.SIGINT in heard and event == signal.SIGINT)
                    heard.append(event)
                    waiting.clear()
                else:
                    self._end(event, stopped=bool(heard))
        return heard[0] if heard else None

    def _next_event(self) -> Any:
        """Waits for an event; None where it is time to look for tasks that are to be stopped."""
        try:
            return self.events.get(timeout=None if self.losing is None else POLL_S)
        except Empty:
            return None

    def _stop_losing(self) -> None:
        assert self.losing is not None
        for number in self.losing(list(self.running)):
            self.lost.add(number)
            with contextlib.suppress(ProcessLookupError):
                self.running[number][0].send_signal(signal.SIGTERM)

    def _start(self, number: int, task: ProcessTask) -> None:
        """Starts a task; called on the main thread only.

        The kernel ties the life of a task to the thread that started it.
        """
        place = self.slots.take(task.ranks)
        words = task.command if place.machine.name is None else task.remote
        self.began(number)
        with open(
            open_inside(
                task.output.parent, task.output.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND
            ),
            "ab",
        ) as output:
            process = subprocess.Popen(
                place.command(words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=place.environment,
                start_new_session=True,  # Ctrl-C of a terminal comes to us alone
            )
        self.running[number] = (process, monotonic(), place)
        threading.Thread(target=self._wait, args=(number, process), daemon=True).start()

    def _wait(self, number: int, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self.events.put(number)

    def _end(self, number: int, stopped: bool) -> None:
        process, since, place = self.running.pop(number)
        self.slots.give(place)
        self.ended(
            number,
            FinishedProcess(
                process.returncode, monotonic() - since, stopped, lost=number in self.lost
            ),
        )

    def _stop(self, heard: signal.Signals, kill: bool) -> None:
        # what we inherited as ignored our tasks ignore too
        deaf = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        usual = heard if deaf else signal.SIGTERM
        for process, *_ in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL if kill else usual)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        with handling(SAVED, lambda number, _: self.events.put(signal.Signals(number))):
            yield

    @contextmanager
    def _none_left(self) -> Iterator[None]:
        """Kills running tasks on the way out, so that none outlives the sweep."""
        try:
            yield
        finally:
            for process, *_ in self.running.values():
                process.kill()

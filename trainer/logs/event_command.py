"""`log.on_event`: a command of the user's that is told of what happens to a run.

The command gets the event as one JSON object on its standard input, and in LONGSPAN_EVENT (its
kind), LONGSPAN_RUN_DIR and LONGSPAN_FACTS (the same JSON). Nothing of the run becomes a part of the
command line, and no shell reads it.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from typing import Any

from trainer.config.finding import Finding
from trainer.config.schema import Config
from trainer.launch.elastic import SECRET
from trainer.logs.redact import redacted
from trainer.watchdog import claim, is_claimed, read_heartbeats, waits_now

KINDS = ("start", "spike", "skip", "hang", "end")
LIMIT_S = 30.0  # of one command; then it is killed, with all that it started
FINISH_S = 10.0  # at the end of a run, for commands that have not ended
MOST_WAITING = 100  # events; later ones are left out while so many wait
FIRST_S = 1.0  # that rank 0 has to tell of a hang before another rank does


class EventCommand:
    """Runs a command for each event, one after another, on a thread of its own.

    Nothing that the command does ends or holds up the run: it has LIMIT_S, and its first failure
    is said in one line.

    Args:
        command: program and arguments in one line, quoted as in a shell.
        directory: of the run.
        name: of the run.
        say: takes a line for the user; called on the thread of the run alone.
    """

    def __init__(
        self,
        command: str,
        directory: Path,
        name: str,
        say: Callable[[str], None],
        limit_s: float = LIMIT_S,
    ):
        self.words = shlex.split(command)
        self.directory = directory
        self.name = name
        self.say = say
        self.limit_s = limit_s
        self.trouble: str | None = None
        self.is_said = False
        self.waiting: Queue[dict[str, Any] | None] = Queue(MOST_WAITING)
        self.running: subprocess.Popen[bytes] | None = None
        self.thread = threading.Thread(target=self._work, name="log.on_event", daemon=True)
        self.thread.start()

    def tell(self, kind: str, **facts: Any) -> None:
        """Hands over an event; texts lose what looks like a secret."""
        self._report()
        event: dict[str, Any] = {
            "event": kind,
            "name": self.name,
            "run_dir": str(self.directory),
        }
        for key, value in facts.items():
            event[key] = redacted(value) if isinstance(value, str) else value
        # One command at a time, and a slow one must not pile up events without end.
        with suppress(Full):
            self.waiting.put_nowait(event)

    def close(self, wait_s: float = FINISH_S) -> None:
        """Waits for the commands of earlier events, and kills one that goes on for longer."""
        with suppress(Full):
            self.waiting.put_nowait(None)
        self.thread.join(wait_s)
        if self.thread.is_alive():
            self._kill()
            self.trouble = self.trouble or f"not done {wait_s:g} s after the run"
        self._report()

    def _report(self) -> None:
        if self.trouble is not None and not self.is_said:
            self.is_said = True
            self.say(f"log.on_event: {self.trouble}; the run goes on")

    def _work(self) -> None:
        while (event := self.waiting.get()) is not None:
            try:
                self._run(event)
            except OSError as error:
                self._fail(f"{self.words[0]}: {error.strerror or error}")

    def _run(self, event: dict[str, Any]) -> None:
        text = json.dumps(event)
        environment = {key: value for key, value in os.environ.items() if key != SECRET}
        environment |= {
            "LONGSPAN_EVENT": event["event"],
            "LONGSPAN_RUN_DIR": event["run_dir"],
            "LONGSPAN_FACTS": text,
        }
        self.running = subprocess.Popen(
            self.words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            # A group of its own, so that all that it starts can be killed with it.
            start_new_session=True,
        )
        try:
            _, said = self.running.communicate(f"{text}\n".encode(), timeout=self.limit_s)
        except subprocess.TimeoutExpired:
            self._kill()
            self._fail(f"{event['event']}: not done within {self.limit_s:g} s, and killed")
            return
        if self.running.returncode:
            lines = said.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            self._fail(
                f"{event['event']}: exit status {self.running.returncode}:"
                f" {redacted(lines[-1])[:200]}"
            )

    def _kill(self) -> None:
        if self.running is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.running.pid, signal.SIGKILL)

    def _fail(self, trouble: str) -> None:
        self.trouble = self.trouble or trouble


def tell_of_hang(config: Config, directory: Path, notes: Path, why: str) -> None:
    """Tells of a hang on a rank other than rank 0, once for all ranks, unless rank 0 does.

    Rank 0 cannot where it is the one that hangs: then the end of the run is told here as well.

    Args:
        config: of the run.
        directory: of the run.
        notes: folder of the heartbeat notes of this attempt.
        why: the message of the hang.
    """
    if config.log.on_event is None:
        return
    rank_0_waits = waits_now(read_heartbeats(notes, 1)[0])
    if rank_0_waits:
        time.sleep(FIRST_S)
    # Where rank 0 has told the end, this is the echo of it.
    if is_claimed(notes, "end") or not claim(notes, "hang"):
        return
    command = EventCommand(
        config.log.on_event, directory, config.name, lambda line: print(line, file=sys.stderr)
    )
    command.tell("hang", why=why)
    if not rank_0_waits and claim(notes, "end"):
        command.tell("end", outcome="failed", why=why)
    command.close()


def check_on_event(config: Config) -> Iterator[Finding]:
    """Checks that log.on_event is a command that there is."""
    command = config.log.on_event
    if command is None:
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        yield Finding(
            "log.on_event",
            command,
            f"it cannot be read as a command ({str(error).lower()})",
            "quote it as in a shell",
        )
        return
    if not words:
        yield Finding("log.on_event", command, "it is empty", "use log.on_event=null")
    elif shutil.which(words[0]) is None:
        yield Finding(
            "log.on_event",
            command,
            f"there is no program {words[0]} that may be run",
            "give its path, and make it executable with chmod +x",
        )

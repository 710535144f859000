"""Runs a small job through the public command and disturbs it on purpose.

The reference is a run that is not disturbed. A disturbed run must end, after the same command is
given again, with the same weights bit for bit and the same rows of metrics. The phase of a run is
read from the heartbeat notes of its ranks (trainer/watchdog.py), so that a kill can be aimed at a
step, a save, an evaluation or the first batch.

fault_cases.py holds the other faults, save_delay.py measures asynchronous saves, and
`scripts/chaos.py` prints the table.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from trainer.checkpoint.manifest import read_manifest
from trainer.errors import DONE
from trainer.logs.jsonl import METRICS, read
from trainer.run_dir import SCRATCH
from trainer.verify.whole_runs import write_documents
from trainer.watchdog import HeartbeatNote, read_heartbeats

STEPS = 14
RANKS = 2
PATIENCE_S = 300
FIRST_BATCH = "the first batch"
STEP_PHASES = ("reading", "forward", "backward", "gradient")
LOST_SINCE_CHECKPOINT = "steps since the last checkpoint"

Moment = Callable[[HeartbeatNote], bool]

# Predicates over a rank's heartbeat note, by the phase of the run that they recognise.
MOMENTS: dict[str, Moment] = {
    FIRST_BATCH: lambda note: note.step <= 1,
    "a step": lambda note: note.phase.startswith(STEP_PHASES),
    "a save": lambda note: note.phase == "saving" or note.phase.startswith("looking after"),
    "an evaluation": lambda note: note.phase == "evaluation",
}


class FaultOutcome(NamedTuple):
    """One line of the table of faults.

    Attributes:
        fault: what was done to the run.
        shown: what the user sees.
        lost: what work is lost.
        as_promised: the run kept the promise of this line.
    """

    fault: str
    shown: str
    lost: str
    as_promised: bool


class EndedProcess(NamedTuple):
    """Exit status and combined output of a command."""

    code: int
    output: str

    def line(self, word: str) -> str:
        """Returns the first line of the output that contains `word`."""
        for line in self.output.splitlines():
            if word in line:
                return line.strip()
        return "NOTHING OF IT"


@dataclass
class FaultInjection:
    """A folder of runs and the undisturbed run that they are compared with.

    Args:
        folder: receives the data, the runs and their output.
        seed: of the random moments at which runs are killed.

    Attributes:
        reference: outcome of the undisturbed run, as `outcome` returns it.
        common: settings that every run shares.
    """

    folder: Path
    seed: int = 0
    reference: object = None
    common: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        documents = write_documents(self.folder / "text")
        self.common = [
            "data=files",
            f"data.path={documents}",
            f"data.cache={self.folder / 'cache'}",
            f"steps={STEPS}",
            "context_length=126",
            "batch_tokens=504",
            "model.width=32",
            "model.layers=2",
            "model.heads=4",
            "engine=fsdp",
            "evaluation.every=5",
            "evaluation.batches=2",
            "checkpoint.every=2",
            "wandb.mode=disabled",
            f"parallel.context={RANKS}",
        ]
        ended = self.run("truth")
        assert ended.code == DONE, ended.output
        self.reference = self.outcome("truth")

    def start(self, name: str, *overrides: str, **environment: str) -> subprocess.Popen[str]:
        """Starts the command with the common settings, a run directory `name` and `overrides`."""
        words = [*self.common, f"run_dir={self.folder / name}", *overrides]
        with open(self.folder / f"{name}.out", "w", encoding="utf-8") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "trainer", *words],
                stdout=output,
                stderr=output,
                text=True,
                env={**os.environ, **environment},
            )

    def end(self, name: str, process: subprocess.Popen[str]) -> EndedProcess:
        """Waits for a command and reads what it printed.

        Raises:
            subprocess.TimeoutExpired: it takes longer than PATIENCE_S.
        """
        process.wait(timeout=PATIENCE_S)
        output = (self.folder / f"{name}.out").read_text(encoding="utf-8")
        return EndedProcess(process.returncode, output)

    def run(self, name: str, *overrides: str, **environment: str) -> EndedProcess:
        """Starts a command and waits for its end."""
        process = self.start(name, *overrides, **environment)
        return self.end(name, process)

    def outcome(self, name: str) -> object:
        """Returns checksums of the last step's weights and optimiser, and the logged steps.

        None when the run did not reach its last step.
        """
        checkpoint = self.folder / name / "checkpoints" / f"step_{STEPS:08d}"
        if not checkpoint.is_dir():
            return None
        checksums = {}
        for file, entry in read_manifest(checkpoint)["files"].items():
            checksums[file] = entry["sha256"]
        steps = []
        for row in read(self.folder / name / METRICS):
            # Times and memory differ between equal runs and are left out of the comparison.
            steps.append((row["step"], row["tokens"], row["loss"]))
        return checksums, steps

    def matches(self, name: str, ended: EndedProcess) -> bool:
        """Reports that a command succeeded and its run equals the reference."""
        return ended.code == DONE and self.outcome(name) == self.reference

    def finishes(self, name: str, *overrides: str) -> bool:
        """Gives the same command again and compares the finished run with the reference."""
        return self.matches(name, self.run(name, *overrides))

    def wait_for(
        self, name: str, process: subprocess.Popen[str], moment: Moment, after: int
    ) -> HeartbeatNote | None:
        """Waits until rank 0 is past step `after` and in the phase that `moment` recognises.

        Returns:
            The note of that moment; None when the run ended first.
        """
        folder = self.folder / name / SCRATCH / "watch_0"
        began = time.time()
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < deadline:
            note = read_heartbeats(folder, 1)[0]
            if note is not None:
                # An earlier start of the same run leaves its notes behind: only fresh ones count.
                fresh = note.beat > began and note.passed
                if fresh and note.step > after and moment(note):
                    return note
            # A phase of this model lasts about a millisecond, so the poll must be shorter.
            time.sleep(0.0005)
        return None

    def ranks(self, process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
        """Returns the rank processes below a launcher, by rank."""
        processes = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            processes[int(child.environ()["RANK"])] = child
        return processes

    def kills(self, count: int, say: Callable[[str], None]) -> Iterator[FaultOutcome]:
        """Kills launchers at `count` moments, run after run.

        Yields:
            One line for each kind of moment.
        """
        kills_by_moment: dict[str, int] = dict.fromkeys(MOMENTS, 0)
        differing_runs = 0
        runs = 0
        began = time.monotonic()
        while sum(kills_by_moment.values()) < count:
            runs += 1
            name = f"killed {runs}"
            self._kill_until_last_steps(name, count, kills_by_moment, say)
            if not self.finishes(name):
                differing_runs += 1
        seconds_per_kill = (time.monotonic() - began) / max(count, 1)
        say(
            f"{runs} runs, {count} kills, {seconds_per_kill:.1f} s for each kill and its part of"
            " the runs to the end"
        )
        shown = "the same command ends with the same weights, bit for bit"
        if differing_runs:
            shown = f"{differing_runs} RUNS DIFFER"
        for moment, times in kills_by_moment.items():
            fault = f"killed (SIGKILL) {times} times in {moment}"
            yield FaultOutcome(fault, shown, LOST_SINCE_CHECKPOINT, not differing_runs)

    def _kill_until_last_steps(
        self, name: str, count: int, kills_by_moment: dict[str, int], say: Callable[[str], None]
    ) -> None:
        """Kills one run again and again, each time further on, and counts the kills."""
        after = 0
        # The last two steps are left to the run, or it could end before a moment is met.
        while sum(kills_by_moment.values()) < count and after < STEPS - 2:
            if after == 0 and not kills_by_moment[FIRST_BATCH]:
                moment = FIRST_BATCH
            else:
                moment = self.random.choice(list(MOMENTS)[1:])
            process = self.start(name)
            note = self.wait_for(name, process, MOMENTS[moment], after)
            time.sleep(self.random.uniform(0, 0.01))
            process.kill()
            process.wait()
            if note is None:
                return
            kills_by_moment[moment] += 1
            after = note.step
            kills = sum(kills_by_moment.values())
            say(f"{kills}/{count} killed in {moment}: step {note.step}, {note.phase}")

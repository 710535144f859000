"""Faults on purpose, on a small run of two ranks through the command that a user gives: what is
seen, and what is lost.

The truth is a run that nobody disturbed. However another is disturbed, once the same command is
given again it must end with the same weights, bit for bit, and with the same rows of metrics. Where
a run is, is read from its ranks' notes (trainer/watchdog.py), so that a kill meets a step, a save,
an evaluation or the first batch at will.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import psutil

from trainer.checkpoint.manifest import read_manifest
from trainer.errors import BAD_CONFIG, BAD_RUN, DONE
from trainer.logs.jsonl import METRICS, read
from trainer.run_dir import SCRATCH
from trainer.verify.whole_runs import write_documents
from trainer.watchdog import HeartbeatNote, read_heartbeats

STEPS = 14
RANKS = 2
PATIENCE_S = 300
MOMENTS = {  # of a run: whether a rank's note shows it
    "the first batch": lambda note: note.step <= 1,
    "a step": lambda note: note.phase.startswith(("reading", "forward", "backward", "gradient")),
    "a save": lambda note: note.phase == "saving" or note.phase.startswith("looking after"),
    "an evaluation": lambda note: note.phase == "evaluation",
}


class FaultOutcome(NamedTuple):
    """A line of the table: what was done, what the user saw, what was lost, and whether the promise
    was kept."""

    fault: str
    shown: str
    lost: str
    kept: bool


class EndedProcess(NamedTuple):
    """A command's exit status and all that it printed."""

    code: int
    told: str

    def line(self, word: str) -> str:
        """The first line with a word in it, without what is only true here."""
        return next(
            (line.strip() for line in self.told.splitlines() if word in line), "NOTHING OF IT"
        )


@dataclass
class FaultInjection:
    """A folder of runs, and the truth they are held against."""

    folder: Path
    seed: int = 0
    truth: object = None
    common: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        data = write_documents(self.folder / "text")
        self.common = [
            *(
                "data=files",
                f"data.path={data}",
                f"data.cache={self.folder / 'cache'}",
                f"steps={STEPS}",
                "context_length=126",
            ),
            *(
                "batch_tokens=504",
                "model.width=32",
                "model.layers=2",
                "model.heads=4",
                "engine=fsdp",
                "evaluation.every=5",
            ),
            *(
                "evaluation.batches=2",
                "checkpoint.every=2",
                "wandb.mode=disabled",
                f"parallel.context={RANKS}",
            ),
        ]
        end = self.run("truth")
        assert end.code == DONE, end.told
        self.truth = self.outcome("truth")

    def start(self, name: str, *more: str, **environment: str) -> subprocess.Popen[str]:
        """Give the command; its words are those of every run here and `more`."""
        words = [*self.common, f"run_dir={self.folder / name}", *more]
        with open(self.folder / f"{name}.out", "w", encoding="utf-8") as told:
            return subprocess.Popen(
                [sys.executable, "-m", "trainer", *words],
                stdout=told,
                stderr=told,
                text=True,
                env={**os.environ, **environment},
            )

    def end(self, name: str, process: subprocess.Popen[str]) -> EndedProcess:
        """Wait for a command's end."""
        process.wait(timeout=PATIENCE_S)
        return EndedProcess(
            process.returncode, (self.folder / f"{name}.out").read_text(encoding="utf-8")
        )

    def run(self, name: str, *more: str, **environment: str) -> EndedProcess:
        return self.end(name, self.start(name, *more, **environment))

    def outcome(self, name: str) -> object:
        """Checksums of the last step's weights and optimiser, and what every step logged; None
        where it did not come so far."""
        place = self.folder / name / "checkpoints" / f"step_{STEPS:08d}"
        if not place.is_dir():
            return None
        sums = {file: entry["sha256"] for file, entry in read_manifest(place)["files"].items()}
        return sums, [
            (row["step"], row["tokens"], row["loss"]) for row in read(self.folder / name / METRICS)
        ]

    def finishes(self, name: str, *more: str) -> bool:
        """Whether the same command, given again, ends as the truth did."""
        return self.run(name, *more).code == DONE and self.outcome(name) == self.truth

    def meets(
        self,
        name: str,
        process: subprocess.Popen[str],
        moment: Callable[[HeartbeatNote], bool],
        after: int,
    ) -> HeartbeatNote | None:
        """Wait until rank 0 of the run is past step `after` and at such a moment; None where the
        run ended first."""
        folder = self.folder / name / SCRATCH / "watch_0"
        began = time.time()
        end = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < end:
            note = read_heartbeats(folder, 1)[0]
            if (
                note is not None
                and note.beat > began
                and note.passed
                and note.step > after
                and moment(note)
            ):
                return note
            time.sleep(0.0005)
        return None

    def kills(self, count: int, say: Callable[[str], None]) -> Iterator[FaultOutcome]:
        """Kill launchers at `count` moments, run after run; a line for each kind of moment."""
        met: dict[str, int] = dict.fromkeys(MOMENTS, 0)
        wrong = 0
        number = 0
        began = time.monotonic()
        while sum(met.values()) < count:
            number, name, after = number + 1, f"killed {number}", 0
            while sum(met.values()) < count and after < STEPS - 2:
                kind = (
                    "the first batch"
                    if after == 0 and not met["the first batch"]
                    else self.chance.choice(list(MOMENTS)[1:])
                )
                process = self.start(name)
                note = self.meets(
                    name, process, MOMENTS[kind], 0 if kind == "the first batch" else after
                )
                time.sleep(self.chance.uniform(0, 0.01))
                process.kill()
                process.wait()
                if note is None:
                    break
                met[kind] += 1
                after = note.step
                say(f"{sum(met.values())}/{count} killed in {kind}: step {note.step}, {note.phase}")
            wrong += not self.finishes(name)
        each = (time.monotonic() - began) / max(count, 1)
        say(
            f"{number} runs, {count} kills, {each:.1f} s for each kill and its part of the runs to"
            " the end"
        )
        for kind, times in met.items():
            shown = (
                "the same command ends with the same weights, bit for bit"
                if not wrong
                else f"{wrong} RUNS DIFFER"
            )
            yield FaultOutcome(
                f"killed (SIGKILL) {times} times in {kind}",
                shown,
                "steps since the last checkpoint",
                not wrong,
            )

    def faults(self) -> Iterator[FaultOutcome]:
        """Every other fault, one after another."""
        yield from (
            each()
            for each in (
                self.rank_killed,
                self.rank_stopped,
                self.rank_stopped_once,
                self.asked_to_stop,
            )
        )
        yield from (
            each()
            for each in (
                self.damaged,
                self.diverged,
                self.disk_full,
                self.broken_data,
                self.no_network,
            )
        )

    def _ranks(self, process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
        return {
            int(each.environ()["RANK"]): each
            for each in psutil.Process(process.pid).children(recursive=True)
        }

    def rank_killed(self) -> FaultOutcome:
        name = "rank killed"
        more = ("launch.max_restarts=2",)
        process = self.start(name, *more)
        self.meets(name, process, MOMENTS["a step"], 5)
        self._ranks(process)[1].kill()
        began = time.monotonic()
        again = self.folder / name / SCRATCH / "watch_1"
        while process.poll() is None and not any(
            note and note.passed for note in read_heartbeats(again, 1)
        ):
            time.sleep(0.01)
        seconds = time.monotonic() - began
        end = self.end(name, process)
        fine = end.code == DONE and self.outcome(name) == self.truth and "started again" in end.told
        shown = f"all ranks go on from the last checkpoint, after {seconds:.1f} s"
        return FaultOutcome(
            "a rank is killed, launch.max_restarts=2",
            shown,
            "steps since the last checkpoint",
            fine,
        )

    def rank_stopped(self) -> FaultOutcome:
        name = "rank stopped"
        process = self.start(name, "launch.timeout_s=5", "launch.grace_s=1")
        self.meets(name, process, MOMENTS["a step"], 5)
        self._ranks(process)[1].suspend()
        end = self.end(name, process)
        fine = (
            end.code == BAD_RUN
            and f"rank 1 of {RANKS} stands still" in end.told
            and self.finishes(name)
        )
        shown = (
            f"exit status {end.code}:"
            f" {end.line('launch.timeout_s').partition(': ')[2].partition(';')[0]}"
        )
        return FaultOutcome(
            "a rank hangs (SIGSTOP)", shown, "steps since the last checkpoint", fine
        )

    def rank_stopped_once(self) -> FaultOutcome:
        name = "rank stopped once"
        process = self.start(
            name, "launch.timeout_s=5", "launch.grace_s=1", "launch.max_restarts=1"
        )
        self.meets(name, process, MOMENTS["a step"], 5)
        self._ranks(process)[1].suspend()
        end = self.end(name, process)
        fine = end.code == DONE and self.outcome(name) == self.truth and "started again" in end.told
        shown = (
            "which rank it was; all ranks go on from the last checkpoint"
            if fine
            else end.told[-300:]
        )
        return FaultOutcome(
            "a rank hangs, launch.max_restarts=1", shown, "steps since the last checkpoint", fine
        )

    def asked_to_stop(self) -> FaultOutcome:
        name = "asked"
        process = self.start(name, "checkpoint.every=1000")
        self.meets(name, process, MOMENTS["a step"], 4)
        process.send_signal(signal.SIGTERM)
        end = self.end(name, process)
        steps = len(list(read(self.folder / name / METRICS)))
        saved = (self.folder / name / "checkpoints" / f"step_{steps:08d}").is_dir()
        fine = end.code == 143 and saved and self.finishes(name)
        return FaultOutcome(
            "SIGTERM",
            f"exit status {end.code}: {end.line('stopped')}".partition(" after")[0],
            "nothing",
            fine,
        )

    def damaged(self) -> FaultOutcome:
        name = "damaged"
        more = ("checkpoint.keep=3",)
        process = self.start(name, *more)
        self.meets(name, process, MOMENTS["a step"], 7)
        process.kill()
        process.wait()
        newest = sorted((self.folder / name / "checkpoints").glob("step_*"))[-1]
        victim = max(newest.glob("shard_*"), key=lambda path: path.stat().st_size)
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        end = self.run(name, *more)
        fine = (
            end.code == DONE
            and self.outcome(name) == self.truth
            and f"{newest.name} is damaged" in end.told
        )
        return FaultOutcome(
            "a bit of the newest checkpoint flips",
            end.line("is damaged"),
            "the steps between two checkpoints",
            fine,
        )

    def diverged(self) -> FaultOutcome:
        end = self.run(
            "diverged",
            "optim.learning_rate=1e30",
            "schedule.warmup_steps=0",
            "optim.max_grad_norm=0",
        )
        skipped = [row for row in read(self.folder / "diverged" / METRICS) if row.get("skipped")]
        fine = end.code == BAD_RUN and len(skipped) == 3 and "optim.max_skipped=3" in end.told
        shown = (
            f"each such step: {end.line('skipped:').partition(';')[0]}; after 3 in a row exit"
            f" status {end.code}"
        )
        return FaultOutcome("the loss is NaN", shown, "the batches left out", fine)

    def disk_full(self) -> FaultOutcome:
        name = "disk full"
        process = self.start(name)
        resource.prlimit(
            process.pid, resource.RLIMIT_FSIZE, (150_000, 150_000)
        )  # what its ranks inherit
        end = self.end(name, process)
        fine = (
            end.code == BAD_RUN
            and "is full" in end.told
            and "Traceback" not in end.told
            and self.finishes(name)
        )
        shown = f"exit status {end.code}: {end.line('is full').partition(str(self.folder))[0]}..."
        return FaultOutcome("the disk is full", shown, "steps since the last checkpoint", fine)

    def broken_data(self) -> FaultOutcome:
        lines = [
            json.dumps({"text": path.read_text()})
            for path in sorted((self.folder / "text").glob("*.txt"))
        ]
        lines[len(lines) // 2] = lines[len(lines) // 2][:-9] + "\x00"
        (self.folder / "broken.jsonl").write_text("\n".join(lines) + "\n")
        words = (
            f"data.path={self.folder / 'broken.jsonl'}",
            "parallel.context=1",
            "engine=single",
            "steps=2",
        )
        raised = self.run("broken", *words)
        skipped = self.run("skipped", *words, "data.on_error=skip")
        fine = (
            raised.code in (BAD_CONFIG, BAD_RUN)
            and "broken.jsonl line" in raised.told
            and "Traceback" not in raised.told
        )
        fine = fine and skipped.code == DONE and "left out 1" in skipped.told
        shown = (
            f"exit status {raised.code} names the file and line; with data.on_error=skip it is left"
            " out and counted"
        )
        return FaultOutcome(
            "a document in the middle of the data is broken",
            shown,
            "with skip, that document",
            fine,
        )

    def no_network(self) -> FaultOutcome:
        name = "no network"
        key = "0123456789" * 4
        end = self.run(
            name, "wandb.mode=auto", WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9"
        )
        fine = end.code == DONE and self.outcome(name) == self.truth and key not in end.told
        return FaultOutcome("no network for W&B", end.line("going on offline"), "nothing", fine)


def delay(
    chaos: FaultInjection, width: int = 512, layers: int = 5, saves: int = 10, every: int = 6
) -> FaultOutcome:
    """How much longer steps take while a save is on its way, and how much memory the save takes, a
    rank.

    Steps are told apart by how many the save beside them began before; the worst of these means
    counts.
    """
    steps = saves * every + 1
    more = [
        f"model.width={width}",
        f"model.layers={layers}",
        f"steps={steps}",
        f"checkpoint.every={every}",
        "model.heads=8",
    ]
    more += ["context_length=512", "batch_tokens=2048", "evaluation.every=0", "checkpoint.keep=1"]
    process = chaos.start("delay", *more)
    folder = chaos.folder / "delay"
    rows = folder / METRICS
    places = folder / "checkpoints"
    # when each step ended, when each checkpoint was alone there, and how large the rows were
    ended = []
    whole = {}
    size = 0
    while process.poll() is None:
        time.sleep(0.005)
        if rows.exists() and rows.stat().st_size != size:
            size = rows.stat().st_size
            ended += [time.monotonic()] * (len(list(read(rows))) - len(ended))
        due = len(ended) // every * every
        if due and due not in whole and os.listdir(places) == [f"step_{due:08d}"]:
            whole[due] = time.monotonic()
    found = list(read(rows))
    usual = []
    beside = {}
    for step in range(3, steps + 1):
        since = (
            step - 1
        ) % every + 1  # steps since the one with which the last save began, itself counted
        took = ended[step - 1] - ended[step - 2]
        busy = whole.get(step - since, 0.0) > ended[step - 2]
        (beside.setdefault(since, []) if busy else usual).append(took)
    means = [fmean(beside[since]) for since in sorted(beside)]
    bytes_written = sum(path.stat().st_size for path in places.glob("step_*/shard_00000.*"))
    memory = found[-1]["peak_memory_bytes"] - found[every - 1]["peak_memory_bytes"]
    more_by = max(means) / fmean(usual) - 1
    shown = (
        f"{bytes_written / 1e6:.0f} MB a rank: {len(usual)} steps without a save take"
        f" {fmean(usual):.2f} s, the first, second and so on after it began"
        f" {', '.join(f'{mean:.2f}' for mean in means)} s (at most {more_by:+.0%}); the save's"
        f" memory is {memory / 1e6:.0f} MB a rank"
    )
    return FaultOutcome(
        "a checkpoint is saved (asynchronous)",
        shown,
        "nothing",
        process.returncode == DONE and more_by < 0.1,
    )

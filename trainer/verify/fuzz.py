"""The fuzzer: a run spread at random gives what one rank gives, or is refused up front; a mistyped setting is one message.

Three steps of each, in float64, losses and gradient norms within TOLERANCE. Everything is decided by the seed and the number
of the case, so that a finding is repeated by its two numbers.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from parallel.launch import Ranks
from trainer.compose import compose
from trainer.config import BAD_RUN, BAD_WISH, Config, Fault
from trainer.logs.jsonl import METRICS, read
from trainer.parity import write_documents
from trainer.prepare import wish
from trainer.run import run
from trainer.verify.crew import Answer, Crews
from trainer.verify.draw import SMALL, draw_mistakes, draw_run, import_parts

TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 1e-1}  # of the first step's loss alone below float64
STEPS = 3
CHECK_S = 120.0  # a wish is judged within this time, on a machine that others use as well
RUN_S = 240.0
LARGE = 1 << 22  # tokens x width x layers of a mistyped run that is not tried, only judged
REAL = 100  # of so many mistyped commands one is a start of its own


class Finding(NamedTuple):
    """A case that is not as promised: its number, what was asked for, and what became of it."""

    number: int
    words: list[str]
    what: str


class Fuzz:
    """Random cases of one seed.

    Args:
        folder: for data and runs.
        seed: of all cases.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.documents = write_documents(folder / "text")
        compose(SMALL)  # reads and keeps the configs, before they are forked
        import_parts()
        self.crews = Crews(folder)
        self.outcomes: Counter[str] = Counter()

    def close(self) -> None:
        """End the ranks."""
        self.crews.close()

    def runs(self, numbers: Sequence[int]) -> Iterator[Finding]:
        """Random runs, spread and on one rank."""
        for number in numbers:
            common, spread, ranks = draw_run(Random(f"run {self.seed} {number}"), self.folder, self.documents)
            if what := self._compare(number, common, spread, ranks):
                yield Finding(number, [*common, *spread], what)

    def _compare(self, number: int, common: list[str], spread: list[str], ranks: int) -> str | None:
        """What is wrong with a run, or None."""
        here, there = self.folder / f"{number}-one", self.folder / f"{number}-many"
        many = self._judged([*common, *spread, f"run_dir={there}"])
        if isinstance(many, str):
            return self._refusal(many)
        one = self._judged([*common, "engine=single", f"run_dir={here}"])
        if isinstance(one, str):
            self.outcomes["refused on one rank alone"] += 1
            return f"one rank is refused, many are not: {one}"
        answers = {}
        for config, size, place in ((many, ranks, there), (one, 1, here)):
            place.mkdir()
            answers[size if place == there else 0] = answer = self._run(config, size, place)
            if answer.trace:
                self.outcomes["broke"] += 1
                return f"{size} ranks: {_brief(answer.trace)}"
        told = [rows(there), rows(here)]
        for place in (here, there):
            shutil.rmtree(place)
        return self._difference(many, told)

    def _difference(self, config: Config, told: list[list[dict[str, Any]]]) -> str | None:
        many, one = told
        if len(many) != STEPS or len(one) != STEPS:
            self.outcomes["broke"] += 1
            return f"{len(many)} and {len(one)} of {STEPS} steps were logged"
        exact = config.precision == "float64" and config.engine.name != "deepspeed"
        allowed = TOLERANCE["float64" if exact else "float32" if config.precision != "bfloat16" else "bfloat16"]
        for step, (a, b) in enumerate(zip(many, one), 1):
            for name in ("loss", "grad_norm"):
                off = abs(a[name] - b[name]) / max(abs(b[name]), 1e-6)
                if not off <= allowed and (exact or (step == 1 and name == "loss")):
                    self.outcomes["differs"] += 1
                    return f"step {step}: {name} {a[name]!r}, on one rank {b[name]!r} (relative difference {off:.1e})"
        self.outcomes["equal"] += 1
        return None

    def mistakes(self, numbers: Sequence[int]) -> Iterator[Finding]:
        """Mistyped settings: judged by the parent's check; what passes takes a step; a few are starts of their own."""
        base = [*SMALL, "steps=1", "model.width=16", "model.heads=2", "context_length=16"]
        base += ["batch_tokens=32", "evaluation.every=0", "data=files", f"data.path={self.documents}"]
        base += [f"data.cache={self.folder / 'cache'}"]
        for number in numbers:
            place = self.folder / f"{number}-mistake"
            words = draw_mistakes(Random(f"mistake {self.seed} {number}"), [*base, f"run_dir={place}"])
            what = self._real(words) if number % REAL == REAL - 1 else self._mistake(words, place)
            if what:
                yield Finding(number, words[len(base) + 1 :], what)

    def _mistake(self, words: list[str], place: Path) -> str | None:
        config = self._judged(words)
        if isinstance(config, str):
            return self._refusal(config)
        tokens = config.batch_tokens * config.steps * (1 + config.evaluation.every and config.evaluation.batches)
        if config.parallel.ranks > 1 or tokens * config.model.width * config.model.layers > LARGE or config.launch.dry_run:
            self.outcomes["passed, not tried"] += 1
            return None
        place.mkdir(exist_ok=True)
        answer = self._run(config, 1, place)
        self.outcomes["passed and broke" if answer.trace else "passed and ran"] += 1
        shutil.rmtree(place, ignore_errors=True)
        return f"passed the check, then: {_brief(answer.trace)}" if answer.trace else None

    def _real(self, words: list[str]) -> str | None:
        """Start it as a user does."""
        self.outcomes["started as a command"] += 1
        try:
            done = subprocess.run(
                [sys.executable, "-m", "trainer", *words],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=RUN_S,
                cwd=Path(__file__).parents[2],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            return f"no end in {RUN_S:g} s"
        if "Traceback" in done.stdout + done.stderr or done.returncode not in (0, BAD_WISH, BAD_RUN):
            return f"exit status {done.returncode}: {_brief(done.stderr)}"
        return None

    def _judged(self, words: list[str]) -> Config | str:
        """The config, or why there is none: '2: message' for a refusal, else a trace."""
        answer = self.crews.run(1, judge, words, seconds=CHECK_S)
        return answer.values[0] if answer.values else answer.trace

    def _refusal(self, told: str) -> str | None:
        """None where a refusal is one as it should be."""
        code, _, message = told.partition(": ")
        if code in (str(BAD_WISH), str(BAD_RUN)) and message.strip() and "Traceback" not in message:
            self.outcomes["refused"] += 1
            return None
        self.outcomes["check broke"] += 1
        return f"the check: {_brief(told)}"

    def _run(self, config: Config, ranks: int, place: Path) -> Answer:
        return self.crews.run(ranks, live, config, ranks, place, seconds=RUN_S)


def judge(rank: int, words: list[str]) -> Config | str:
    """In a forked process: what the command would check before it starts ranks."""
    try:
        return wish(words, say=lambda text: None)
    except Fault as fault:
        return f"{fault.code}: {fault}"


def live(rank: int, config: Config, size: int, place: Path) -> int:
    """In a rank: the whole run."""
    return run(config, Ranks(rank, size, rank, size, torch.device("cpu"), "gloo"), place)


def rows(place: Path) -> list[dict[str, Any]]:
    """What a run logged."""
    return list(read(place / METRICS))


def _brief(trace: str) -> str:
    """The last lines of a trace: where it broke, and why."""
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File") and "site-packages" not in line]
    return " | ".join([*places[-2:], *lines[-2:]])[-700:]


def fuzz(folder: Path, seed: int, many: int, mistakes: int, say: Callable[[str], None]) -> list[Finding]:
    """`many` random runs and `mistakes` mistyped ones; says each finding as it comes, and at the end how many were what."""
    session = Fuzz(folder, seed)
    findings: list[Finding] = []
    try:
        for kind, numbers, cases in (("run", many, session.runs), ("mistake", mistakes, session.mistakes)):
            for finding in cases(range(numbers)):
                findings.append(finding)
                say(f"seed={seed} {kind} {finding.number}: {finding.what}\n    {' '.join(finding.words)}")
    finally:
        session.close()
    say(", ".join(f"{count} {name}" for name, count in session.outcomes.most_common()))
    return findings



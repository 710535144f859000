"""The fuzzer: a run spread at random gives what one rank gives, or is refused; a mistyped setting
is one message.

Three steps of each, losses and gradient norms of all of them. Float64 agrees to its last digits. In
float32 and bfloat16 (and with DeepSpeed, which has no float64) the truth is one rank of
engine=single in the same precision, and Adam divides by no less than `SMOOTH` says, so that a
gradient near zero moves no weight by its sign alone. Everything is decided by the seed and the
number of the case, so that a finding is repeated by its two numbers.
"""

import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trainer import run_dir
from trainer.config.compose import compose
from trainer.config.schema import Config, ParallelConfig
from trainer.errors import BAD_CONFIG, BAD_RUN, UserError
from trainer.launch.elastic import RankInfo
from trainer.logs.jsonl import METRICS, read
from trainer.preflight.check import check_config
from trainer.preflight.prepare import create_run_dir, dry_run, load_config, write_record
from trainer.reach import fitting
from trainer.run import run
from trainer.verify.crew import Answer, Crews, beside
from trainer.verify.draw import LARGEST_CREW, SMALL, draw_run, import_parts
from trainer.verify.mistype import draw_mistakes
from trainer.verify.whole_runs import write_documents

TOLERANCE = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-4, 1e-3),
    "bfloat16": (2e-2, 1e-1),
}  # of losses, of gradient norms
STEPS = 3
ATTEMPTS = 5  # draws of a case until one is not refused
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
        self.folder = folder
        self.seed = seed
        self.documents = write_documents(folder / "text")
        usual = compose(SMALL).config  # reads and keeps the configs, before they are forked
        assert usual is not None
        self.single = usual.engine
        import_parts()
        self.crews = Crews(folder)
        self.outcomes: Counter[str] = Counter()
        self.worst: dict[tuple[str, str], float] = {}  # differences by (precision, column)

    def close(self) -> None:
        """End the ranks."""
        self.crews.close()

    def runs(self, numbers: Iterable[int]) -> Iterator[Finding]:
        """Random runs, spread and on one rank."""
        for number in numbers:
            for attempt in range(ATTEMPTS):
                draw = draw_run(
                    Random(f"run {self.seed} {number} {attempt}"), self.folder, self.documents
                )
                words = [*draw.common, *draw.spread]
                many = self._judged([*words, f"run_dir={self.folder / f'{number}-many'}"], fitted)
                if isinstance(many, Config):
                    what = self._compare(number, many)
                else:
                    what = self._refusal(many)
                if what:
                    yield Finding(number, words, what)
                if what or isinstance(many, Config):
                    break
            else:
                self.outcomes["never valid"] += 1

    def _compare(self, number: int, many: Config) -> str | None:
        """What is wrong with a run, or None."""
        here = self.folder / f"{number}-one"
        there = self.folder / f"{number}-many"
        one = many.model_copy(
            update={"parallel": ParallelConfig(), "engine": self.single, "run_dir": str(here)}
        )
        answer = self.crews.run(1, judge_again, one, seconds=CHECK_S)
        if answer.trace or answer.values[0]:
            self.outcomes["refused on one rank alone"] += 1
            return f"one rank is refused, many are not: {answer.trace or answer.values[0]}"
        told = []
        ends = []
        for config, place in ((many, there), (one, here)):
            place.mkdir()
            answer = self._run(config, config.parallel.ranks, place)
            if answer.trace:
                self.outcomes["broke"] += 1
                return f"{config.parallel.ranks} ranks: {_brief(answer.trace)}"
            ends.append(answer.values[0])
            told.append(rows(place))
        for place in (here, there):
            shutil.rmtree(place)
        if ends[0] != ends[1]:
            self.outcomes["differs"] += 1
            return f"it ended with {ends[0]}, on one rank with {ends[1]}"
        if ends[0]:
            self.outcomes["ended with the same message"] += 1
            return None
        return self._difference(many, told)

    def _difference(self, config: Config, told: list[list[dict[str, Any]]]) -> str | None:
        many, one = told
        if len(many) != STEPS or len(one) != STEPS:
            self.outcomes["broke"] += 1
            return f"{len(many)} and {len(one)} of {STEPS} steps were logged"
        for step, (a, b) in enumerate(zip(many, one), 1):
            for name, allowed in zip(("loss", "grad_norm"), TOLERANCE[config.precision]):
                off = _apart(a[name], b[name])
                self.worst[config.precision, name] = max(
                    off, self.worst.get((config.precision, name), 0.0)
                )
                if not off <= allowed:
                    self.outcomes["differs"] += 1
                    return (
                        f"step {step}: {name} {a[name]!r}, on one rank {b[name]!r} (relative"
                        f" difference {off:.1e})"
                    )
        self.outcomes[f"equal in {config.precision}"] += 1
        return None

    def mistakes(self, numbers: Iterable[int]) -> Iterator[Finding]:
        """Mistyped settings: judged by the parent's check; what passes is run; a few are starts of
        their own."""
        base = [*SMALL, "steps=2", "model.width=16", "model.heads=2", "context_length=16"]
        base += [
            "batch_tokens=32",
            "evaluation.every=0",
            "data=files",
            f"data.path={self.documents}",
        ]
        base += [f"data.cache={self.folder / 'cache'}"]
        for number in numbers:
            place = self.folder / f"{number}-mistake"
            words = draw_mistakes(
                Random(f"mistake {self.seed} {number}"), [*base, f"run_dir={place}"]
            )
            what = self._real(words) if number % REAL == REAL - 1 else self._mistake(words, place)
            if what:
                yield Finding(number, words[len(base) + 1 :], what)

    def _mistake(self, words: list[str], place: Path) -> str | None:
        config = self._judged(words)
        if isinstance(config, str):
            return self._refusal(config)
        if self._costly(config):
            self.outcomes["passed, not tried"] += 1
            return None
        answer = self.crews.run(config.parallel.ranks, start, config, place, seconds=RUN_S)
        shutil.rmtree(place, ignore_errors=True)
        ends = {end if isinstance(end, str) else "" for end in answer.values} - {""}
        if answer.trace or any(not end.startswith(f"{BAD_RUN}: ") for end in ends):
            self.outcomes["passed and broke"] += 1
            return f"passed the check, then: {_brief(answer.trace or str(ends))}"
        self.outcomes["passed and ended with a message" if ends else "passed and ran"] += 1
        return None

    def _costly(self, config: Config) -> bool:
        """Whether a mistyped run is more than a moment's work here, or work of other machines."""
        tokens = config.batch_tokens * config.steps + config.evaluation.sample_tokens
        tokens += config.evaluation.batches * config.batch_tokens if config.evaluation.every else 0
        large = tokens * config.model.width * config.model.layers > LARGE or config.steps > 100
        elsewhere = config.launch.name != "local" or config.parallel.ranks > LARGEST_CREW
        return large or elsewhere or config.engine.compile

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
        if "Traceback" in done.stdout + done.stderr or done.returncode not in (
            0,
            BAD_CONFIG,
            BAD_RUN,
        ):
            return f"exit status {done.returncode}: {_brief(done.stderr)}"
        return None

    def _judged(self, words: list[str], how: Callable[..., Any] | None = None) -> Config | str:
        """The config, or why there is none: '2: message' for a refusal, else a trace."""
        answer = self.crews.run(1, how or judge, words, seconds=CHECK_S)
        return answer.values[0] if answer.values else answer.trace

    def _refusal(self, told: str) -> str | None:
        """None where a refusal is one as it should be."""
        code, _, message = told.partition(": ")
        if (
            code in (str(BAD_CONFIG), str(BAD_RUN))
            and message.strip()
            and "Traceback" not in message
        ):
            self.outcomes["refused"] += 1
            return None
        self.outcomes["check broke"] += 1
        return f"the check: {_brief(told)}"

    def _run(self, config: Config, ranks: int, place: Path) -> Answer:
        return self.crews.run(ranks, ended, config, ranks, place, seconds=RUN_S)


def judge(rank: int, words: list[str]) -> Config | str:
    """In a forked process: what the command would check before it starts ranks."""
    try:
        return load_config(words, say=lambda text: None)
    except UserError as fault:
        return f"{fault.code}: {fault}"


def fitted(rank: int, words: list[str]) -> Config | str:
    """As judge, of the settings without the sizes that the drawn model has no use for."""
    return judge(rank, fitting(words))


def judge_again(rank: int, config: Config) -> str:
    """In a forked process: why a config that was not typed is refused; nothing where it is not."""
    return "\n".join(check_config(config))


def start(rank: int, config: Config, place: Path) -> int | str:
    """In a rank: what the command does after its check, then the run; '3: message' where that ends
    it."""
    try:
        if config.launch.dry_run:
            return len(dry_run(config, [])) * 0
        with ExitStack() as held:
            if rank == 0:
                config, path = create_run_dir(config)
                held.enter_context(run_dir.lock(path))
                write_record(config, path)
            dist.barrier()
            return live(rank, run_dir.read_config(place), config.parallel.ranks, place)
    except UserError as fault:
        return f"{fault.code}: {fault}"


def ended(rank: int, config: Config, size: int, place: Path) -> int | str:
    """In a rank: the whole run; '3: message' where a fault of data or loss ends it, the run
    directory left out."""
    try:
        return live(rank, config, size, place)
    except UserError as fault:
        if fault.code != BAD_RUN:
            raise
        return f"{fault.code}: {fault}".replace(str(place), "run_dir")


def live(rank: int, config: Config, size: int, place: Path) -> int:
    """In a rank: the whole run."""
    return run(config, RankInfo(rank, size, rank, size, torch.device("cpu"), "gloo"), place)


def rows(place: Path) -> list[dict[str, Any]]:
    """What a run logged."""
    return list(read(place / METRICS))


def _apart(a: float | None, b: float | None) -> float:
    """Relative difference of what two rows say; a step without any target has no loss, and must
    have none in either."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / max(abs(b), 1e-6)


def _brief(trace: str) -> str:
    """The last lines of a trace: where it broke, and why."""
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File") and "site-packages" not in line]
    return " | ".join([*places[-2:], *lines[-2:]])[-700:]


def fuzz(
    folder: Path, seed: int, many: int, mistakes: int, say: Callable[[str], None], lanes: int = 2
) -> list[Finding]:
    """`many` random runs and `mistakes` mistyped ones; says each finding as it comes, and last how
    many were what.

    lanes: processes that each take the next case when they are done with one.
    """
    session = Fuzz(folder, seed)
    cases = [("run", number) for number in range(many)] + [
        ("mistake", number) for number in range(mistakes)
    ]
    findings = []
    outcomes = Counter()
    worst = {}
    for told in beside(lanes, _lane, session, cases):
        if isinstance(told, tuple):
            counted, differences = told
            outcomes.update(counted)
            worst = {
                key: max(worst.get(key, 0.0), differences.get(key, 0.0))
                for key in {*worst, *differences}
            }
        else:
            kind, finding = told
            findings.append(finding)
            say(
                f"seed={seed} {kind} {finding.number}: {finding.what}\n   "
                f" {' '.join(finding.words)}"
            )
    say(", ".join(f"{count} {name}" for name, count in outcomes.most_common()))
    say(
        "largest differences: "
        + ", ".join(f"{' '.join(key)} {off:.1e}" for key, off in sorted(worst.items()))
    )
    return findings


def _lane(
    take: Callable[[], int | None], tell: Callable[[Any], None], session: Fuzz, cases: list[Any]
) -> None:
    """In a forked process: cases one after the other, on ranks of its own."""
    session.crews = Crews(session.folder)
    try:
        while (number := take()) is not None:
            kind, case = cases[number]
            for finding in (session.runs if kind == "run" else session.mistakes)([case]):
                tell([kind, finding])
    finally:
        session.close()
    tell((session.outcomes, session.worst))

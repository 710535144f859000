"""Fuzzer: a run on random ranks equals the run on one rank, or is refused with a message.

Every case trains three steps and compares their losses and gradient norms. Float64 must agree to
its last digits. In float32 and bfloat16 (and with DeepSpeed, which has no float64) the reference is
one rank of engine=single in the same precision; Adam's epsilon is raised to `SMOOTH`, so that a
gradient near zero does not move a weight by its sign alone. A case depends on the seed and its
number only, so a finding is repeated by these two numbers.

Mistyped settings are tried as well: each must end in one message, or in a run that works.
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
from trainer.errors import BAD_CONFIG, BAD_RUN, DONE, UserError
from trainer.launch.elastic import RankInfo
from trainer.logs import run_logger
from trainer.logs.jsonl import METRICS, read
from trainer.logs.plots import plots
from trainer.preflight.check import check_config
from trainer.preflight.prepare import create_run_dir, dry_run, load_config, write_record
from trainer.preflight.reach import fitting
from trainer.stages import run
from trainer.verify.crew import Crews
from trainer.verify.draw import LARGEST_CREW, SMALL, draw_run, import_parts
from trainer.verify.mistype import draw_mistakes
from trainer.verify.whole_runs import write_documents

# Largest relative differences of losses and of gradient norms.
TOLERANCE = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-4, 1e-3),
    "bfloat16": (2e-2, 1e-1),
}
STEPS = 3
ATTEMPTS = 5  # draws of a case before it counts as never valid
CHECK_S = 120.0  # generous, because other processes use the machine as well
RUN_S = 240.0
LARGE = 1 << 22  # tokens x width x layers above which a mistyped run is checked but not run
LONG = 100  # steps above which it is not run either
COMMAND_EVERY = 100  # one of so many mistyped cases starts a process, as a user would
SMALLEST_SCALE = 1e-6  # of a figure: below it differences count absolutely
TRACE_CHARACTERS = 700


class FuzzFinding(NamedTuple):
    """A case that breaks the promise.

    Attributes:
        number: of the case, which with the seed repeats it.
        words: its settings.
        problem: what went wrong.
    """

    number: int
    words: list[str]
    problem: str


class Fuzz:
    """Random cases of one seed.

    Args:
        folder: receives data and runs.
        seed: of all cases.

    Attributes:
        outcomes: number of cases by how they ended.
        worst: largest difference by (precision, column).
    """

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.seed = seed
        self.documents = write_documents(folder / "text")
        # Composing here caches the config files before the ranks are forked.
        default_config = compose(SMALL).config
        assert default_config is not None
        self.single = default_config.engine
        import_parts()
        self.crews = Crews(folder)
        self.outcomes: Counter[str] = Counter()
        self.worst: dict[tuple[str, str], float] = {}

    def close(self) -> None:
        """Ends the ranks."""
        self.crews.close()

    def runs(self, numbers: Iterable[int]) -> Iterator[FuzzFinding]:
        """Compares random runs on several ranks with the same runs on one rank."""
        for number in numbers:
            valid = False
            for attempt in range(ATTEMPTS):
                random = Random(f"run {self.seed} {number} {attempt}")
                draw = draw_run(random, self.folder, self.documents)
                words = [*draw.common, *draw.spread]
                directory = self.folder / f"{number}-many"
                checked = self._checked([*words, f"run_dir={directory}"], check_fitting)
                if isinstance(checked, Config):
                    valid = True
                    problem = self._compare(number, checked)
                else:
                    problem = self._refusal(checked)
                if problem:
                    yield FuzzFinding(number, words, problem)
                if problem or valid:
                    break
            else:
                self.outcomes["never valid"] += 1

    def _compare(self, number: int, parallel: Config) -> str | None:
        """Runs a config on its ranks and on one rank; returns how they differ, or None."""
        single_directory = self.folder / f"{number}-one"
        parallel_directory = self.folder / f"{number}-many"
        single = parallel.model_copy(
            update={
                "parallel": ParallelConfig(),
                "engine": self.single,
                "run_dir": str(single_directory),
            }
        )
        answer = self.crews.run(1, check_again, single, seconds=CHECK_S)
        if answer.trace or answer.values[0]:
            self.outcomes["refused on one rank alone"] += 1
            return f"one rank is refused, many are not: {answer.trace or answer.values[0]}"
        logs = []
        ends = []
        for config, directory in ((parallel, parallel_directory), (single, single_directory)):
            directory.mkdir()
            ranks = config.parallel.ranks
            answer = self.crews.run(ranks, run_to_end, config, ranks, directory, seconds=RUN_S)
            if answer.trace:
                self.outcomes["broke"] += 1
                return f"{ranks} ranks: {_brief(answer.trace)}"
            ends.append(answer.values[0])
            logs.append(logged_rows(directory))
        # Only equal runs are removed: those of a finding stay for whoever looks into it.
        shutil.rmtree(single_directory)
        shutil.rmtree(parallel_directory)
        if ends[0] != ends[1]:
            self.outcomes["differs"] += 1
            return f"it ended with {ends[0]}, on one rank with {ends[1]}"
        if ends[0]:
            self.outcomes["ended with the same message"] += 1
            return None
        return self._difference(parallel, logs)

    def _difference(self, config: Config, logs: list[list[dict[str, Any]]]) -> str | None:
        """Compares the logs of two runs, the parallel one first; returns how they differ."""
        parallel, single = logs
        if len(parallel) != STEPS or len(single) != STEPS:
            self.outcomes["broke"] += 1
            return f"{len(parallel)} and {len(single)} of {STEPS} steps were logged"
        columns = list(zip(("loss", "grad_norm"), TOLERANCE[config.precision]))
        for step, (parallel_row, single_row) in enumerate(zip(parallel, single), 1):
            for column, tolerance in columns:
                value = parallel_row[column]
                expected = single_row[column]
                difference = _relative_difference(value, expected)
                key = (config.precision, column)
                self.worst[key] = max(difference, self.worst.get(key, 0.0))
                # Written so that NaN, which compares as false, is a finding.
                if not difference <= tolerance:
                    self.outcomes["differs"] += 1
                    return (
                        f"step {step}: {column} {value!r}, on one rank {expected!r} (relative"
                        f" difference {difference:.1e})"
                    )
        self.outcomes[f"equal in {config.precision}"] += 1
        return None

    def mistakes(self, numbers: Iterable[int]) -> Iterator[FuzzFinding]:
        """Checks mistyped settings and runs those that pass; some are started as a command."""
        base = [
            *SMALL,
            "steps=2",
            "model.width=16",
            "model.heads=2",
            "context_length=16",
            "batch_tokens=32",
            "evaluation.every=0",
            "data=files",
            f"data.path={self.documents}",
            f"data.cache={self.folder / 'cache'}",
        ]
        for number in numbers:
            directory = self.folder / f"{number}-mistake"
            random = Random(f"mistake {self.seed} {number}")
            words = draw_mistakes(random, [*base, f"run_dir={directory}"])
            if number % COMMAND_EVERY == COMMAND_EVERY - 1:
                problem = self._start_command(words)
            else:
                problem = self._try_mistake(words, directory)
            if problem:
                yield FuzzFinding(number, words[len(base) + 1 :], problem)

    def _try_mistake(self, words: list[str], directory: Path) -> str | None:
        """Checks mistyped settings and, where they pass, runs them; returns a problem or None."""
        checked = self._checked(words)
        if isinstance(checked, str):
            return self._refusal(checked)
        if self._costly(checked):
            self.outcomes["passed, not tried"] += 1
            return None
        ranks = checked.parallel.ranks
        answer = self.crews.run(ranks, start_run, checked, directory, seconds=RUN_S)
        shutil.rmtree(directory, ignore_errors=True)
        messages = set()
        for value in answer.values:
            if isinstance(value, str) and value:
                messages.add(value)
        # Past the check only data, disk or loss may end a run, which have this exit status.
        unexpected = [text for text in messages if not text.startswith(f"{BAD_RUN}: ")]
        if answer.trace or unexpected:
            self.outcomes["passed and broke"] += 1
            return f"passed the check, then: {_brief(answer.trace or str(messages))}"
        outcome = "passed and ended with a message" if messages else "passed and ran"
        self.outcomes[outcome] += 1
        return None

    def _costly(self, config: Config) -> bool:
        """Reports that a mistyped run takes more than a moment, or needs other machines."""
        tokens = config.batch_tokens * config.steps + config.evaluation.sample_tokens
        if config.evaluation.every:
            tokens += config.evaluation.batches * config.batch_tokens
        size = tokens * config.model.width * config.model.layers
        large = size > LARGE or config.steps > LONG
        elsewhere = config.launch.name != "local" or config.parallel.ranks > LARGEST_CREW
        return large or elsewhere or config.engine.compile

    def _start_command(self, words: list[str]) -> str | None:
        """Starts mistyped settings as a user does; returns a problem or None."""
        self.outcomes["started as a command"] += 1
        try:
            ended = subprocess.run(
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
        broke = "Traceback" in ended.stdout + ended.stderr
        if broke or ended.returncode not in (DONE, BAD_CONFIG, BAD_RUN):
            return f"exit status {ended.returncode}: {_brief(ended.stderr)}"
        return None

    def _checked(self, words: list[str], check: Callable[..., Any] | None = None) -> Config | str:
        """Checks settings in a forked process.

        Returns:
            The config; 'CODE: message' for a refusal, or a trace when the check itself broke.
        """
        answer = self.crews.run(1, check or check_words, words, seconds=CHECK_S)
        if answer.values:
            return answer.values[0]
        return answer.trace

    def _refusal(self, text: str) -> str | None:
        """Returns None for a proper refusal, 'CODE: message', and else the problem."""
        code, _, message = text.partition(": ")
        proper = code in (str(BAD_CONFIG), str(BAD_RUN)) and "Traceback" not in message
        if proper and message.strip():
            self.outcomes["refused"] += 1
            return None
        self.outcomes["check broke"] += 1
        return f"the check: {_brief(text)}"


def check_words(rank: int, words: list[str]) -> Config | str:
    """Checks settings as the command does before it starts ranks; runs in a forked process."""
    try:
        return load_config(words, say=lambda text: None)
    except UserError as error:
        return f"{error.code}: {error}"


def check_fitting(rank: int, words: list[str]) -> Config | str:
    """Checks settings after the sizes that the drawn model does not take are left out."""
    return check_words(rank, fitting(words))


def check_again(rank: int, config: Config) -> str:
    """Checks a config that was not typed; returns the errors, or an empty string."""
    return "\n".join(check_config(config))


def start_run(rank: int, config: Config, directory: Path) -> int | str:
    """Does on a rank all that the command does after its check.

    Returns:
        The exit status; 'CODE: message' when a UserError ends the run.
    """
    try:
        if config.launch.dry_run:
            dry_run(config, [])
            return DONE
        with ExitStack() as stack:
            if rank == 0:
                config, path = create_run_dir(config)
                stack.enter_context(run_dir.lock(path))
                write_record(config, path)
            dist.barrier()
            # Read from the directory, as the ranks of a real run do.
            recorded = run_dir.read_config(directory)
            return live(rank, recorded, config.parallel.ranks, directory)
    except UserError as error:
        return f"{error.code}: {error}"


def run_to_end(rank: int, config: Config, size: int, directory: Path) -> int | str:
    """Runs a config on a rank, without its plots.

    Returns:
        The exit status; 'CODE: message', with the run directory left out, when data or loss end
        the run: that message must be the same on any number of ranks.
    """
    # Drawing takes longer than the three steps.
    run_logger.plots = lambda *arguments, **named: []
    try:
        return live(rank, config, size, directory)
    except UserError as error:
        if error.code != BAD_RUN:
            raise
        return f"{error.code}: {error}".replace(str(directory), "run_dir")
    finally:
        run_logger.plots = plots


def live(rank: int, config: Config, size: int, directory: Path) -> int:
    """Runs a config on a rank; returns the exit status."""
    rank_info = RankInfo(rank, size, rank, size, torch.device("cpu"), "gloo")
    return run(config, rank_info, directory)


def logged_rows(directory: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics that a run logged."""
    return list(read(directory / METRICS))


def _relative_difference(value: float | None, expected: float | None) -> float:
    """Compares two figures; a step without a target has None, which only equals None."""
    if value is None or expected is None:
        return 0.0 if value is expected else math.inf
    return abs(value - expected) / max(abs(expected), SMALLEST_SCALE)


def _brief(trace: str) -> str:
    """Shortens a trace to the last two places of our own code and the error."""
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File") and "site-packages" not in line]
    return " | ".join([*places[-2:], *lines[-2:]])[-TRACE_CHARACTERS:]

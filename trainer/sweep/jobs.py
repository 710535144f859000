"""Jobs of a sweep as their directories describe them, and the table of all."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.errors import UserError
from trainer.files.limited_reader import json_object
from trainer.files.safe_files import replace_inside
from trainer.logs.figures import read_figures
from trainer.logs.redact import word_without_secrets

OUTCOME = "outcome.json"
OUTPUT = "output.txt"
DONE = "done"
FAILED = "failed"
STOPPED = "stopped"
LOST = "stopped early"  # by hydra.launcher.stop_early; not run again
ENDED = (DONE, LOST)
# Settings with these prefixes do not change what is computed.
SILENT = ("launch.", "log.", "logger", "wandb.")
HEAD = ("job", "settings", "loss", "held-out loss", "tokens/s", "peak memory", "seconds", "outcome")


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its KEY=VALUE settings and its directory."""

    number: int
    settings: tuple[str, ...]
    directory: Path


@dataclass(frozen=True)
class JobOutcome:
    """Record of how a job ended; missing until it has, however often it started.

    Attributes:
        settings: of the job.
        outcome: done, failed, stopped or stopped early.
        code: exit status.
        seconds: of all its starts together.
        message: the last line that a failed job printed.
    """

    settings: list[str]
    outcome: str
    code: int
    seconds: float
    message: str = ""

    def write(self, directory: Path) -> None:
        """Replaces the record in a job's directory."""
        replace_inside(directory, OUTCOME, json.dumps(asdict(self), indent=2) + "\n")


def outcome(job: Job) -> JobOutcome | None:
    """Reads how a job ended the last time; None when it never did.

    Raises:
        UserError: the record is damaged, or belongs to another job.
    """
    path = job.directory / OUTCOME
    if not path.is_file():
        return None
    try:
        record = JobOutcome(**json_object(path, follow=False))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove it, and job {job.number} runs again"
        ) from error
    # Numbers are not enough: other settings give the same number to another job.
    recorded = " ".join(essence(record.settings))
    expected = " ".join(essence(job.settings))
    if essence(record.settings) != essence(job.settings):
        raise UserError(
            f"job {job.number} would be {expected}, but {job.directory}"
            f" holds {recorded}; give another hydra.sweep.dir (a search"
            " repeats itself only with hydra.sweeper.sampler.seed=NUMBER)"
        )
    return record


def essence(settings: Sequence[str]) -> list[str]:
    """Returns the settings that decide what is computed, without Hydra's leading plus."""
    plain = [setting.lstrip("+") for setting in settings]
    return [setting for setting in plain if not setting.startswith(SILENT)]


def own(jobs: Sequence[Job]) -> dict[int, list[str]]:
    """Returns by job the settings in which the jobs differ, without secrets.

    A job that differs in none, as a single job does, keeps all of its settings.
    """
    counts: Counter[str] = Counter()
    for job in jobs:
        counts.update(essence(job.settings))
    own_settings = {}
    for job in jobs:
        settings = essence(job.settings)
        differing = [setting for setting in settings if counts[setting] < len(jobs)]
        public = [word_without_secrets(setting) for setting in differing or settings]
        own_settings[job.number] = public
    return own_settings


def varied(jobs: Sequence[Job]) -> dict[int, str]:
    """Returns the same settings as one line a job."""
    return {number: " ".join(settings) for number, settings in own(jobs).items()}


def table(jobs: Sequence[Job]) -> str:
    """Returns a row for each job, aligned as plain text and valid as markdown."""
    names = varied(jobs)
    rows: list[tuple[str, ...]] = [HEAD]
    for job in sorted(jobs, key=lambda job: job.number):
        rows.append(_row(job, names[job.number]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    # Text is aligned left: the number of the job, its settings and its outcome.
    text_columns = (0, 1, len(HEAD) - 1)
    rule = []
    for index, width in enumerate(widths):
        rule.append("-" * width if index in text_columns else "-" * (width - 1) + ":")
    rows.insert(1, tuple(rule))
    lines = []
    for row in rows:
        cells = []
        for index, (cell, width) in enumerate(zip(row, widths)):
            cells.append(cell.ljust(width) if index in text_columns else cell.rjust(width))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(job: Job, name: str) -> tuple[str, ...]:
    """Returns the cells of a job, in the order of HEAD."""
    record = outcome(job)
    figures = read_figures(job.directory)
    seconds = math.nan
    state = "not started"
    if record is not None:
        seconds = record.seconds
        state = record.outcome
        if state == FAILED:
            state = f"failed ({record.code})"
    return (
        str(job.number),
        name,
        _shown(figures.loss, ".4f"),
        _shown(figures.held_out_loss, ".4f"),
        _shown(figures.tokens_per_second, ",.0f"),
        _shown(figures.peak_bytes / 2**20, ",.0f", " MiB"),
        _shown(seconds, ".0f"),
        state,
    )


def _shown(value: float, form: str, unit: str = "") -> str:
    """Formats a figure; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:{form}}{unit}"

"""The jobs of a sweep as their directories show them: settings, how each ended, its figures, and
one table of all."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.errors import UserError
from trainer.limited_reader import json_object
from trainer.logs.figures import read_figures
from trainer.logs.redact import word_without_secrets
from trainer.safe_files import replace_inside

OUTCOME = "outcome.json"
OUTPUT = "output.txt"
DONE = "done"
FAILED = "failed"
STOPPED = "stopped"
SILENT = ("launch.", "log.", "wandb.")  # settings that make no other run
HEAD = ("job", "settings", "loss", "held-out loss", "tokens/s", "peak memory", "seconds", "outcome")


@dataclass(frozen=True)
class Job:
    """One run of a sweep: KEY=VALUE settings, and the directory that is its own."""

    number: int
    settings: tuple[str, ...]
    directory: Path


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended, as its directory tells; there is none before it did, however often it
    started.

    outcome: done, failed or stopped. seconds: of all its starts together. message: the last line of
    a job that failed.
    """

    settings: list[str]
    outcome: str
    code: int
    seconds: float
    message: str = ""

    def write(self, directory: Path) -> None:
        """Replace what the directory told."""
        replace_inside(directory, OUTCOME, json.dumps(asdict(self), indent=2) + "\n")


def outcome(job: Job) -> JobOutcome | None:
    """How the job ended the last time; None when it never did.

    Raises:
        Fault: the directory is another job's.
    """
    path = job.directory / OUTCOME
    if not path.is_file():
        return None
    try:
        told = JobOutcome(**json_object(path, follow=False))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove it, and job {job.number} runs again"
        ) from error
    if essence(told.settings) != essence(job.settings):
        raise UserError(
            f"job {job.number} would be {' '.join(essence(job.settings))}, but {job.directory}"
            f" holds {' '.join(essence(told.settings))}; give another hydra.sweep.dir (a search"
            " repeats itself only with hydra.sweeper.sampler.seed=NUMBER)"
        )
    return told


def essence(settings: Sequence[str]) -> list[str]:
    """The settings that make the run what it is, as a user writes them."""
    plain = [setting.lstrip("+") for setting in settings]
    return [each for each in plain if not each.startswith(SILENT)]


def own(jobs: Sequence[Job]) -> dict[int, list[str]]:
    """By job: the settings in which the jobs differ, fit to be shown; those of one job alone are
    all its own."""
    counts = Counter(each for job in jobs for each in essence(job.settings))
    differ = {
        job.number: [each for each in essence(job.settings) if counts[each] < len(jobs)]
        for job in jobs
    }
    named = {job.number: differ[job.number] or essence(job.settings) for job in jobs}
    return {
        number: [word_without_secrets(setting) for setting in settings]
        for number, settings in named.items()
    }


def varied(jobs: Sequence[Job]) -> dict[int, str]:
    """The same in one line a job."""
    return {number: " ".join(settings) for number, settings in own(jobs).items()}


def table(jobs: Sequence[Job]) -> str:
    """A row for each job, in columns that stand as they are and in markdown alike."""
    names = varied(jobs)
    rows: list[tuple[str, ...]] = [HEAD]
    for job in sorted(jobs, key=lambda job: job.number):
        told = outcome(job)
        found = read_figures(job.directory)
        ended = (
            "not started"
            if told is None
            else told.outcome
            if told.outcome != FAILED
            else f"failed ({told.code})"
        )
        rows.append(
            (
                str(job.number),
                names[job.number],
                _shown(found.loss, ".4f"),
                _shown(found.held_out_loss, ".4f"),
                _shown(found.tokens_per_second, ",.0f"),
                _shown(found.peak_bytes / 2**20, ",.0f", " MiB"),
                _shown(told.seconds if told else math.nan, ".0f"),
                ended,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = [column in (0, 1, len(HEAD) - 1) for column in range(len(HEAD))]
    rows.insert(
        1, tuple("-" * width if at else "-" * (width - 1) + ":" for width, at in zip(widths, left))
    )
    cells = [
        [
            cell.ljust(width) if at else cell.rjust(width)
            for cell, width, at in zip(row, widths, left)
        ]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _shown(value: float, form: str, unit: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{form}}{unit}"

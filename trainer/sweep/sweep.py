"""Sweeps, `python -m trainer -m KEY=VALUE,VALUE ...`: a run for every combination, and one table.

Hydra's sweepers list the jobs. Here all jobs are checked before any starts, and run side by side,
each by the command that a user would give. Jobs that ended well are not run again when the sweep
goes on.
"""

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from trainer import run_dir
from trainer.config.compose import sweep_words
from trainer.config.groups import CONF
from trainer.config.overrides import MULTIRUN_WORDS
from trainer.config.own.folders import own_words, search_path
from trainer.config.schema import Config
from trainer.errors import BUG, UserError
from trainer.errors import DONE as WELL
from trainer.files.limited_reader import json_object
from trainer.files.safe_files import replace_inside
from trainer.launch.exit_report import SAVED
from trainer.logs.figures import read_figures
from trainer.sweep import hydra_launcher, slurm_array
from trainer.sweep.batch import JobBatch, arguments, check_jobs, labels, told_again, twins
from trainer.sweep.early_stop import EarlyStop
from trainer.sweep.hydra_launcher import SweepPlan
from trainer.sweep.jobs import ENDED, Job, JobOutcome, essence, outcome, own, table
from trainer.sweep.machines import Slots

RECORD = "sweep.json"
TABLE = "table.md"
COMPOSED = "multirun.yaml"
COMMAND = (sys.executable, "-u", "-m", "trainer")


def _recorded(record: Path) -> list[str]:
    """Reads the settings of the sweep that a directory holds.

    Raises:
        UserError: the record is damaged.
    """
    try:
        return [str(word) for word in json_object(record, follow=False)["settings"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{record} cannot be read ({error}); give another hydra.sweep.dir, or remove that file"
        ) from error


def _has_ended(outcome: JobOutcome | None) -> bool:
    """Tells whether a job is not run again."""
    return outcome is not None and outcome.outcome in ENDED


class SweepFailed(Exception):
    """Raised when a job failed and the sweeper cannot go on without its value."""


class SweepStopped(Exception):
    """Raised when a signal stopped the sweep; carries the signal."""


class DryRunShown(Exception):
    """Raised when launch.dry_run has printed the jobs, none of them started."""


def run_sweep(words: Sequence[str], command: Sequence[str] = COMMAND) -> int:
    """Runs every job of a sweep that has not ended well before; returns the exit status.

    Args:
        words: settings, some with several values, and `-m`.
        command: starts one run.

    Raises:
        UserError: a job has a wrong setting, no setting has several values, or the directory
            belongs to another sweep.
    """
    faults: list[str] = []
    settings = sweep_words([word for word in words if word not in MULTIRUN_WORDS], faults)
    if faults:
        raise UserError("\n".join(faults))
    hydra_launcher.register(hydra_launcher.TorchrunLauncher)
    with ExitStack() as held:
        running = Sweep(command, held)
        code = WELL
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            hydra: Any = GlobalHydra.instance().hydra
        try:
            words_of_hydra = [*search_path(), *settings]
            hydra.multirun("train", running, words_of_hydra, with_log_configuration=False)
        except SweepFailed as failed:
            print(f"the sweep goes no further: {failed}", file=sys.stderr)
        except SweepStopped as stopped:
            code = SAVED[stopped.args[0]]
        except DryRunShown:
            return code
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_plainly(error, words)) from error
        finally:
            running.tidy()
        return running.close(code, words)


def _plainly(error: Exception, words: Sequence[str]) -> str:
    """Returns an error of Hydra in one line, with a remedy."""
    said = " ".join(str(error).split())
    if "hydra/sweeper" in said:
        return f"{said}; pip install 'longspan[search]' brings hydra/sweeper=optuna"
    if "does not support sweep type" in said:
        return (
            f"{' '.join(words)}: intervals are for a search; add hydra/sweeper=optuna, or list the"
            " values"
        )
    return said


class Sweep:
    """Task function of Hydra that receives the jobs of a sweep in batches from the launcher.

    Args:
        command: starts one run.
        held: keeps the lock of the sweep's directory.
    """

    def __init__(self, command: Sequence[str], held: ExitStack):
        self.command = command
        self.held = held
        self.jobs: list[Job] = []
        self.plan: SweepPlan | None = None
        self.fresh = True
        self.submitted: str | None = None

    def begin(self, plan: SweepPlan) -> None:
        """Checks the plan of a sweep against the record in its directory.

        Raises:
            UserError: no setting has several values, or the directory holds something else.
        """
        parser = OverridesParser.create()
        if not any(each.is_sweep_override() for each in parser.parse_overrides(plan.settings)):
            raise UserError(
                "-m runs one job for each value, but no setting has several; write for example"
                " model=full,sliding"
            )
        self.plan = plan
        record = plan.directory / RECORD
        self.fresh = not plan.directory.exists()
        if record.is_file():
            was = _recorded(record)
            if was != essence(plan.settings):
                raise UserError(
                    f"hydra.sweep.dir={plan.directory} holds the sweep {' '.join(was)}; give those"
                    " settings again, or another hydra.sweep.dir"
                )
        elif plan.directory.is_file() or (
            plan.directory.is_dir() and any(plan.directory.iterdir())
        ):
            raise UserError(
                f"hydra.sweep.dir={plan.directory} holds something that is no sweep; name another"
                " folder"
            )

    def _take(self, plan: SweepPlan) -> None:
        """Locks the directory and records the sweep in it."""
        plan.directory.mkdir(parents=True, exist_ok=True)
        try:
            self.held.enter_context(run_dir.lock(plan.directory))
        except UserError as fault:
            raise UserError(str(fault).replace("run_dir", "hydra.sweep.dir")) from fault
        replace_inside(
            plan.directory,
            RECORD,
            json.dumps({"settings": essence(plan.settings)}, indent=2) + "\n",
        )

    def batch(self, jobs: Sequence[Job]) -> list[float | Exception]:
        """Runs a batch of jobs; returns the held-out loss of each, or the error of a failed search.

        A grid ignores the losses, and goes on with NaN.
        """
        assert self.plan is not None
        if not jobs:
            raise UserError("no job comes of these settings; one of them has no value")
        before = {job.number: outcome(job) for job in jobs}
        left = [
            job for job in jobs if (was := before[job.number]) is None or was.outcome not in ENDED
        ]
        effective: dict[int, str] = {}
        done = len(jobs) - len(left)
        configs = check_jobs(left, self.jobs, self.plan, effective)
        # Slurm's tasks do not wait for one another, so there each job computes its own.
        several = all(config.launch.name == "slurm" for config in configs.values())
        same = {} if several else twins(left, effective)
        numbers = {job.number: job for job in left}
        for number, other in same.items():
            print(f"job {number} comes to the same run as job {other}, which is run for both")
        left = [job for job in left if job.number not in same]
        if any(config.launch.dry_run for config in configs.values()):
            raise self._shown(left, configs)
        on_slurm = [number for number in configs if configs[number].launch.name == "slurm"]
        if on_slurm and len(on_slurm) < len(configs):
            raise UserError(
                f"launch: job {on_slurm[0]} is for Slurm, and others are not; give launch=slurm"
                " for all, or for none"
            )
        slots = None if on_slurm else Slots(self.plan.ranks)
        if not self.jobs:
            self._take(self.plan)
        self.jobs += jobs
        if slots is None:
            self._submit(jobs, left, configs)
            return [math.nan] * len(jobs)
        ready = f", {done} of them done already" if done else ""
        print(f"{len(jobs)} jobs in {self.plan.directory}{ready}; {slots.describe()}", flush=True)
        stopped = JobBatch(
            left,
            configs,
            before,
            own(jobs),
            self.command,
            self.plan.directory.resolve().name,
            self._early_stop(),
        ).run(slots)
        if stopped is not None:
            raise SweepStopped(stopped)
        for number, other in same.items():
            if was := outcome(numbers[other]):
                told_again(numbers[number], numbers[other], was)
        return [self._value(job) for job in jobs]

    def _early_stop(self) -> EarlyStop | None:
        """Returns the halving over all jobs so far; None where every job ends by itself."""
        assert self.plan is not None
        if self.plan.stop_early is None:
            return None
        directories = {job.number: job.directory for job in self.jobs}
        halving = EarlyStop(self.plan.stop_early, directories)
        # Those that ended before set the measure for the others.
        for job in self.jobs:
            if _has_ended(outcome(job)):
                list(halving.look([job.number]))
        return halving

    def _submit(self, jobs: Sequence[Job], left: Sequence[Job], configs: dict[int, Config]) -> None:
        """Hands the jobs that are left to Slurm, as one array."""
        assert self.plan is not None
        if not left:
            return
        names = own(jobs)
        group = self.plan.directory.resolve().name
        words = {}
        for job in left:
            more = labels(configs[job.number], names[job.number], group)
            words[job.number] = [*arguments(job), *more]
        self.submitted = slurm_array.submit(
            self.plan.directory, left, configs, words, self.plan.ranks
        )

    def _value(self, job: Job) -> float | Exception:
        told = outcome(job)
        if (
            self.plan is not None
            and self.plan.searches
            and (told is None or told.outcome not in ENDED)
        ):
            return SweepFailed(f"job {job.number} failed, {told.message if told else ''}")
        return read_figures(job.directory).held_out_loss

    def _shown(self, jobs: Sequence[Job], configs: dict[int, Config]) -> DryRunShown:
        """Prints the jobs that would be started."""
        for job in jobs:
            ranks = f"{configs[job.number].parallel.ranks} rank(s)"
            print(
                f"job {job.number}: {ranks}, {job.directory}:"
                f" {shlex.join([*self.command, *own_words(), *arguments(job)])}"
            )
        assert self.plan is not None
        if jobs and all(configs[job.number].launch.name == "slurm" for job in jobs):
            directory = self.plan.directory.resolve()
            print(slurm_array.array_script(directory, jobs, configs, self.plan.ranks))
        print("nothing was started (launch.dry_run=true)")
        return DryRunShown()

    def tidy(self) -> None:
        """Removes the files of a sweep that did not begin.

        Hydra's sweeper makes the folder before it makes the jobs.
        """
        if self.plan is not None and self.fresh and not self.jobs:
            (self.plan.directory / COMPOSED).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.plan.directory.rmdir()

    def close(self, code: int, words: Sequence[str]) -> int:
        """Prints the table and the command that goes on; returns the exit status."""
        assert self.plan is not None
        told = table(self.jobs)
        replace_inside(self.plan.directory, TABLE, told + "\n")
        print(told)
        if self.submitted is not None:
            print(self.submitted)
            return code
        ended = [outcome(job) for job in self.jobs]
        left = [
            job.number
            for job, each in zip(self.jobs, ended)
            if each is None or each.outcome not in ENDED
        ]
        if left:
            again = [word for word in words if not word.startswith("hydra.sweep.dir=")]
            again = [*own_words(), *again, f"hydra.sweep.dir={self.plan.directory}"]
            command = shlex.join(["python", "-m", "trainer", *again])
            which = f"{len(left)} of {len(ended)} jobs not done ({', '.join(map(str, left))})"
            print(f"{which}; to go on with those: {command}", file=sys.stderr)
        return code or (BUG if left else WELL)

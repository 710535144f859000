"""A batch of jobs: checked together before any starts, then run side by side.

Each job has a directory of its own.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Sequence
from typing import Any

from trainer.config.schema import Config
from trainer.errors import DONE as WELL
from trainer.errors import UserError
from trainer.logs.figures import read_figures
from trainer.logs.jsonl import EVALUATION, METRICS
from trainer.logs.labels import variable
from trainer.preflight import prepare
from trainer.run_dir import plain_config
from trainer.sweep.early_stop import EarlyStop
from trainer.sweep.hydra_launcher import SweepPlan
from trainer.sweep.jobs import DONE, FAILED, LOST, OUTCOME, OUTPUT, STOPPED, Job, JobOutcome, varied
from trainer.sweep.machines import Slots
from trainer.sweep.process_pool import FinishedProcess, ProcessPool, ProcessTask
from trainer.texts import quoted

# Hidden option: the process number of the sweep, or PARENT, then the settings of a run.
JOB_OF = "--job-of"
PARENT = "parent"  # on another machine than the sweep's: Slurm ends the job with it
LONGEST_NAME = 128  # characters that W&B accepts
LONGEST_TAG = 64
TWICE = "{} is the folder of several jobs; hydra.sweep.subdir must tell them apart"
BATCH = (
    "launch=slurm hands jobs over and does not wait for them, but a search, or stop_early, goes by"
    " how they do; list the values, or run the search inside a job"
)
ONE_ID = "wandb.id and WANDB_RUN_ID name one run of W&B, and -m starts several; leave them out"
APART = ("name", "run_dir", "resume", "launch", "log", "logger", "wandb")
BLIND = (
    "evaluation.every=0, but a search goes by held-out loss, and so does stop_early; use for"
    " example evaluation.every=50"
)


def check_jobs(
    jobs: Sequence[Job], known: Sequence[Job], plan: SweepPlan, effective: dict[int, str]
) -> dict[int, Config]:
    """Checks every job and returns its config by number.

    Args:
        jobs: to check.
        known: jobs of earlier batches, whose directories are taken.
        plan: of the sweep.
        effective: receives by job the text that identifies its run, see `essential`.

    Raises:
        UserError: all errors of all jobs, each with the jobs that have it.
    """
    configs: dict[int, Config] = {}
    # A dictionary without values: a remark on many seeds is printed once, in order.
    remarks: dict[str, None] = {}
    unused_settings: dict[int, dict[str, str]] = {}
    errors: dict[str, list[Job]] = {}
    directories = [job.directory for job in (*known, *jobs)]
    for job in jobs:
        if directories.count(job.directory) > 1:
            errors.setdefault(TWICE.format(job.directory), []).append(job)
        try:
            config = prepare.load_config(
                arguments(job),
                say=lambda remark: remarks.setdefault(remark),
                dropped=lambda keys, job=job: unused_settings.update({job.number: keys}),
            )
        except UserError as error:
            for line in str(error).splitlines():
                errors.setdefault(line, []).append(job)
            continue
        configs[job.number] = config
        if config.launch.name == "slurm" and (plan.searches or plan.stop_early):
            errors.setdefault(BATCH, []).append(job)
        wandb = config.wandb
        one_id = wandb.mode != "disabled" and (wandb.id or variable("id"))
        if one_id and len(directories) > 1:
            errors.setdefault(ONE_ID, []).append(job)
        if (plan.searches or plan.stop_early) and not config.evaluation.every:
            errors.setdefault(BLIND, []).append(job)
    # A setting that reaches a part of some job's model is right for the sweep; of none, a mistake.
    if unused_settings and len(unused_settings) == len(jobs):
        key_sets = [set(keys) for keys in unused_settings.values()]
        for key in set.intersection(*key_sets):
            sentence = unused_settings[jobs[0].number][key]
            errors.setdefault(sentence, []).extend(jobs)
    if errors:
        raise UserError(_error_text(errors, jobs))
    for remark in remarks:
        print(remark)
    for job in jobs:
        for sentence in unused_settings[job.number].values():
            print(f"job {job.number}: {sentence}")
    for job in jobs:
        effective[job.number] = essential(configs[job.number], unused_settings[job.number])
    return configs


def _error_text(errors: dict[str, list[Job]], jobs: Sequence[Job]) -> str:
    """Returns a line for each error, with its jobs unless all of them have it."""
    names = varied(jobs)
    lines = []
    for error, affected in errors.items():
        if len(affected) < len(jobs):
            listed = "; ".join(f"job {job.number}: {names[job.number]}" for job in affected)
            lines.append(f"{error} ({listed})")
        else:
            lines.append(error)
    return "\n".join(lines)


def essential(config: Config, unused: Collection[str]) -> str:
    """Returns the config as text without all that does not change what is computed.

    Left out are names, folders, the console, and settings that reach no part of the model.
    """
    tree = plain_config(config)
    for key in APART:
        tree.pop(key, None)
    for key in unused:
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[last] = None
    return json.dumps(tree, sort_keys=True)


def twins(jobs: Sequence[Job], effective: dict[int, str]) -> dict[int, int]:
    """Returns by job the earlier job that computes the same, so that it need not run."""
    first_job: dict[str, int] = {}
    repeated = {}
    for job in jobs:
        if job.number in effective:
            other = first_job.setdefault(effective[job.number], job.number)
            if other != job.number:
                repeated[job.number] = other
    return repeated


def arguments(job: Job) -> list[str]:
    """Returns the words of a job's command."""
    words = [setting.lstrip("+") for setting in job.settings]
    # Quoted, because a directory may contain characters of Hydra's grammar.
    words.append(f"run_dir={quoted(str(job.directory))}")
    return words


def labels(config: Config, own: Sequence[str], group: str) -> list[str]:
    """Returns W&B settings of a job for all that the user did not name.

    The group is the sweep's folder; name and tags are the settings that vary. Characters of Hydra's
    grammar are left out, and text longer than W&B accepts is cut.
    """
    wandb = config.wandb
    if wandb.mode == "disabled":
        return []
    group = _without_grammar(group)
    name = _without_grammar(" ".join(own))
    words = []
    if (wandb.group or variable("group")) is None and group:
        words.append(f"wandb.group='{group[:LONGEST_NAME]}'")
    if (wandb.name or variable("name")) is None:
        words.append(f"wandb.name='{name[:LONGEST_NAME]}'")
    if not (wandb.tags or variable("tags")):
        tags = [quoted(_without_grammar(setting)[:LONGEST_TAG]) for setting in own]
        words.append(f"wandb.tags=[{','.join(tags)}]")
    return words


def _without_grammar(text: str) -> str:
    return re.sub(r"""[\\'"$]""", "", text)


class JobBatch:
    """Runs jobs side by side, prints their start and end, and records how they ended.

    Args:
        jobs: to run.
        configs: of each job.
        before: how each ended the last time.
        owns: the settings that distinguish each.
        command: starts one run.
        group: name of the sweep.
        early_stop: names the jobs that are losing; None = every job ends by itself.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        configs: dict[int, Config],
        before: dict[int, JobOutcome | None],
        owns: dict[int, list[str]],
        command: Sequence[str],
        group: str,
        early_stop: EarlyStop | None = None,
    ):
        self.early_stop = early_stop
        self.jobs = {job.number: job for job in jobs}
        self.configs = configs
        self.before = before
        self.owns = owns
        self.group = group
        self.command = [*command, JOB_OF]
        # Bytes of output that earlier starts of a job left behind.
        self.read: dict[int, int] = {}

    def run(self, slots: Slots) -> Any:
        """Runs all jobs; returns the signal that stopped them, or None."""
        tasks = {}
        for number, job in self.jobs.items():
            job.directory.mkdir(parents=True, exist_ok=True)
            (job.directory / OUTCOME).unlink(missing_ok=True)
            ranks = self.configs[number].parallel.ranks
            words = [*arguments(job), *labels(self.configs[number], self.owns[number], self.group)]
            tasks[number] = ProcessTask(
                [*self.command, str(os.getpid()), *words],
                ranks,
                job.directory / OUTPUT,
                remote=[*self.command, PARENT, *words],
            )
        losing = None if self.early_stop is None else self.early_stop.look
        return ProcessPool(slots, self._began, self._ended, losing).run(tasks)

    def _began(self, number: int) -> None:
        output = self.jobs[number].directory / OUTPUT
        self.read[number] = output.stat().st_size if output.exists() else 0
        print(f"job {number} starts: {' '.join(self.owns[number])}", flush=True)

    def _ended(self, number: int, end: FinishedProcess) -> None:
        job = self.jobs[number]
        previous = self.before[number]
        seconds = end.seconds
        if previous:
            seconds += previous.seconds
        last = ""
        if end.code == WELL:
            kind = DONE
        elif end.lost:
            kind = LOST
        elif end.stopped:
            kind = STOPPED
        else:
            kind = FAILED
            last = self._last(number)
        JobOutcome(list(job.settings), kind, end.code, seconds, last).write(job.directory)
        figures = read_figures(job.directory)
        if kind == FAILED:
            result = (
                f"FAILED with exit status {end.code}: {last}; all it said is in"
                f" {job.directory / OUTPUT}"
            )
        else:
            result = f"{kind}: loss {figures.loss:.4f}, held-out loss {figures.held_out_loss:.4f}"
        print(f"job {number} {result}, {end.seconds:.0f} s", flush=True)

    def _last(self, number: int) -> str:
        """Returns the last line that a job printed since its latest start."""
        with open(self.jobs[number].directory / OUTPUT, "rb") as file:
            file.seek(self.read[number])
            lines = file.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            if line.strip():
                return line.strip()
        return "it said nothing"


def told_again(job: Job, other: Job, was: JobOutcome) -> None:
    """Copies the figures of the job that ran for both into the folder of its twin."""
    job.directory.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, EVALUATION):
        if (other.directory / name).is_file():
            shutil.copyfile(other.directory / name, job.directory / name)
    message = f"the same run as job {other.number}"
    JobOutcome(list(job.settings), was.outcome, was.code, was.seconds, message).write(job.directory)

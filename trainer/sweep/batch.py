"""A batch of jobs: judged together before any starts, then run side by side, each in a directory of
its own."""

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
from trainer.sweep.hydra_launcher import SweepPlan
from trainer.sweep.jobs import DONE, FAILED, OUTCOME, OUTPUT, STOPPED, Job, JobOutcome, varied
from trainer.sweep.process_pool import FinishedProcess, ProcessPool, ProcessTask, Slots
from trainer.texts import quoted

JOB_OF = "--job-of"  # hidden: the sweep's process number, then a run's settings
TWICE = "{} is the folder of several jobs; hydra.sweep.subdir must tell them apart"
BATCH = (
    "launch=slurm hands over a run at a time, and -m waits for its jobs; submit a script with the"
    " whole sweep in it"
)
ONE_ID = "wandb.id and WANDB_RUN_ID name one run of W&B, and -m starts several; leave them out"
APART = ("name", "run_dir", "resume", "launch", "log", "wandb")
BLIND = (
    "evaluation.every=0, but a search goes by held-out loss; use for example evaluation.every=50"
)


def check_jobs(
    jobs: Sequence[Job], known: Sequence[Job], plan: SweepPlan, effective: dict[int, str]
) -> dict[int, Config]:
    """The config of each job, by number; `effective` is filled with what each comes to, see
    essential.

    Raises:
        Fault: everything that is wrong with any of them, and of which jobs that is true.
    """
    configs: dict[int, Config] = {}
    said: dict[str, None] = {}  # what was fitted, once for all seeds
    idle: dict[int, dict[str, str]] = {}  # settings that reach no part of a job's model
    faults: dict[str, list[Job]] = {}
    places = [job.directory for job in (*known, *jobs)]
    for job in jobs:
        if places.count(job.directory) > 1:
            faults.setdefault(TWICE.format(job.directory), []).append(job)
        try:
            configs[job.number] = prepare.load_config(
                arguments(job),
                say=lambda each: said.setdefault(each),
                dropped=lambda keys, job=job: idle.update({job.number: keys}),
            )
        except UserError as fault:
            for splitline in str(fault).splitlines():
                faults.setdefault(splitline, []).append(job)
            continue
        if configs[job.number].launch.name == "slurm":
            faults.setdefault(BATCH, []).append(job)
        wandb = configs[job.number].wandb
        if len(places) > 1 and wandb.mode != "disabled" and (wandb.id or variable("id")):
            faults.setdefault(ONE_ID, []).append(job)
        if plan.searches and not configs[job.number].evaluation.every:
            faults.setdefault(BLIND, []).append(job)
    for key in (
        set.intersection(*(set(keys) for keys in idle.values()))
        if idle and len(idle) == len(jobs)
        else ()
    ):
        faults.setdefault(idle[jobs[0].number][key], []).extend(jobs)
    if faults:
        names = varied(jobs)
        told = {
            fault: "; ".join(f"job {job.number}: {names[job.number]}" for job in of)
            for fault, of in faults.items()
        }
        raise UserError(
            "\n".join(
                f"{fault} ({told[fault]})" if len(of) < len(jobs) else fault
                for fault, of in faults.items()
            )
        )
    for each in said:
        print(each)
    for job in jobs:
        for sentence in idle[job.number].values():
            print(f"job {job.number}: {sentence}")
    effective.update({job.number: essential(configs[job.number], idle[job.number]) for job in jobs})
    return configs


def essential(config: Config, idle: Collection[str]) -> str:
    """The config as text without what makes no other run: names, folders, the console, and settings
    that reach no part."""
    tree = {key: value for key, value in plain_config(config).items() if key not in APART}
    for key in idle:
        *road, last = key.split(".")
        place = tree
        for part in road:
            place = place[part]
        place[last] = None
    return json.dumps(tree, sort_keys=True)


def twins(jobs: Sequence[Job], effective: dict[int, str]) -> dict[int, int]:
    """By job that need not run the job that is the same run."""
    first: dict[str, int] = {}
    found = {}
    for job in jobs:
        if job.number in effective:
            other = first.setdefault(effective[job.number], job.number)
            if other != job.number:
                found[job.number] = other
    return found


def arguments(job: Job) -> list[str]:
    """What the command of a job is given; the directory may hold signs that Hydra reads as its
    own."""
    return [
        *(setting.lstrip("+") for setting in job.settings),
        f"run_dir={quoted(str(job.directory))}",
    ]


def labels(config: Config, own: Sequence[str], group: str) -> list[str]:
    """Under what W&B shows a job, where the user names nothing: the sweep's folder as group, what
    varies as name and tags.

    Signs that Hydra would read as its own are left out, and what is longer than W&B takes is cut.
    """
    wish = config.wandb
    if wish.mode == "disabled":
        return []
    group, name, *tags = [re.sub(r"""[\\'"$]""", "", each) for each in (group, " ".join(own), *own)]
    found = []
    if (wish.group or variable("group")) is None and group:
        found.append(f"wandb.group='{group[:128]}'")
    if (wish.name or variable("name")) is None:
        found.append(f"wandb.name='{name[:128]}'")
    if not (wish.tags or variable("tags")):
        found.append(f"wandb.tags=[{','.join(quoted(tag[:64]) for tag in tags)}]")
    return found


class JobBatch:
    """Jobs that run side by side; says of each when it starts and how it ended, and writes that
    into its directory.

    Args:
        jobs: those to run, and their configs. before: how each ended the last time. owns: the
            settings that set each apart.
        command: what starts one run. group: the name of the sweep.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        configs: dict[int, Config],
        before: dict[int, JobOutcome | None],
        owns: dict[int, list[str]],
        command: Sequence[str],
        group: str,
    ):
        self.jobs = {job.number: job for job in jobs}
        self.configs = configs
        self.before = before
        self.owns = owns
        self.group = group
        self.command = [*command, JOB_OF, str(os.getpid())]
        self.read: dict[int, int] = {}  # how much of its output was there before

    def run(self, slots: Slots) -> Any:
        """Run them all; returns the signal that stopped them, if one did."""
        tasks = {}
        for number, job in self.jobs.items():
            job.directory.mkdir(parents=True, exist_ok=True)
            (job.directory / OUTCOME).unlink(missing_ok=True)
            ranks = self.configs[number].parallel.ranks
            words = [*arguments(job), *labels(self.configs[number], self.owns[number], self.group)]
            tasks[number] = ProcessTask([*self.command, *words], ranks, job.directory / OUTPUT)
        return ProcessPool(slots, self._began, self._ended).run(tasks)

    def _began(self, number: int) -> None:
        output = self.jobs[number].directory / OUTPUT
        self.read[number] = output.stat().st_size if output.exists() else 0
        print(f"job {number} starts: {' '.join(self.owns[number])}", flush=True)

    def _ended(self, number: int, end: FinishedProcess) -> None:
        job = self.jobs[number]
        was = self.before[number]
        kind = DONE if end.code == WELL else STOPPED if end.stopped else FAILED
        last = self._last(number) if kind == FAILED else ""
        seconds = end.seconds + (was.seconds if was else 0)
        JobOutcome(list(job.settings), kind, end.code, seconds, last).write(job.directory)
        found = read_figures(job.directory)
        if kind == FAILED:
            told = (
                f"FAILED with exit status {end.code}: {last}; all it said is in"
                f" {job.directory / OUTPUT}"
            )
        else:
            told = f"{kind}: loss {found.loss:.4f}, held-out loss {found.held_out_loss:.4f}"
        print(f"job {number} {told}, {end.seconds:.0f} s", flush=True)

    def _last(self, number: int) -> str:
        """The last line that a job said."""
        with open(self.jobs[number].directory / OUTPUT, "rb") as file:
            file.seek(self.read[number])
            said = file.read().decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")


def told_again(job: Job, other: Job, was: JobOutcome) -> None:
    """Give a job's folder the figures of the job that was run for both."""
    job.directory.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, EVALUATION):
        if (other.directory / name).is_file():
            shutil.copyfile(other.directory / name, job.directory / name)
    said = f"the same run as job {other.number}"
    JobOutcome(list(job.settings), was.outcome, was.code, was.seconds, said).write(job.directory)

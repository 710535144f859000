"""A sweep under launch=slurm: one job array, each task of which is the batch job of one run.

the command     check all jobs -> a batch script in the folder of each (trainer/launch/slurm.py)
                -> slurm_array.sh in that of the sweep -> sbatch
a task          the batch script of its job, in the same shell, so that Slurm's signals reach
                it; then trainer/sweep/record_outcome.py notes how it ended
the same again  the table, and an array of the jobs that are not done
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.files.limited_reader import json_object
from trainer.files.safe_files import replace_inside
from trainer.launch import slurm
from trainer.sweep.jobs import OUTCOME, Job

SCRIPT = "slurm_array.sh"
FOLDERS = "slurm_array.txt"
SUBMITTED = "slurm_array.json"
SETTINGS = "slurm_job.json"
OWN = ("--job-name=", "--output=")  # of one job alone
QUEUE_S = 60


def array_script(
    directory: Path, jobs: Sequence[Job], configs: dict[int, Config], at_once: int | None
) -> str:
    """Returns the batch script of an array.

    Args:
        directory: of the sweep, absolute.
        jobs: one for each task, in order.
        configs: of each job.
        at_once: ranks of all tasks that may run at once; None = as many as Slurm has room for.

    Raises:
        UserError: the jobs ask Slurm for different machines or times.
    """
    asked = {job.number: _directives(configs[job.number], directory) for job in jobs}
    first = jobs[0].number
    for number, directives in asked.items():
        if directives != asked[first]:
            other = sorted(set(directives) ^ set(asked[first]))
            raise UserError(
                f"launch=slurm: the jobs of a sweep are one array, for which Slurm takes one"
                f" request, but job {first} and job {number} differ in {', '.join(other)}; sweep"
                " settings of the ranks and of launch in commands of their own"
            )
    limit = ""
    if at_once is not None:
        limit = f"%{max(1, at_once // configs[first].parallel.ranks)}"
    output = str(directory).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    record = shlex.join([sys.executable, "-m", "trainer.sweep.record_outcome"])
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={configs[first].name}",
        *(f"#SBATCH {directive}" for directive in asked[first]),
        f"#SBATCH --array=0-{len(jobs) - 1}{limit}",
        f'#SBATCH --output="{output}/slurm-%A_%a.out"',
        "",
        f'job=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(directory / FOLDERS))})',
        f"""trap '{record} "$job" "$?" "$SECONDS"' EXIT""",
        # In this shell, which Slurm sends the warning to.
        f'. "$job/{slurm.SCRIPT}"',
        "",
    ]
    return "\n".join(lines)


def _directives(config: Config, directory: Path) -> list[str]:
    """Returns what a job asks Slurm for, without what every job has of its own."""
    found = []
    for line in slurm.script(config, directory, ()).splitlines():
        directive = line.removeprefix("#SBATCH ")
        if directive != line and not directive.startswith(OWN):
            found.append(directive)
    return found


def submit(
    directory: Path,
    jobs: Sequence[Job],
    configs: dict[int, Config],
    words: dict[int, list[str]],
    at_once: int | None,
) -> str:
    """Writes all scripts and hands the array to sbatch; returns a report.

    Args:
        directory: of the sweep.
        jobs: that are not done.
        configs: of each job.
        words: the command of each job.
        at_once: see `array_script`.

    Raises:
        UserError: an earlier array is in the queue still, or sbatch does not take this one.
    """
    directory = directory.resolve()
    refuse_while_queued(directory)
    text = array_script(directory, jobs, configs, at_once)
    for job in jobs:
        folder = job.directory.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTCOME).unlink(missing_ok=True)
        script = slurm.script(configs[job.number], folder, words[job.number])
        # launch.setup may hold secrets.
        replace_inside(folder, slurm.SCRIPT, script, mode=0o600)
        replace_inside(folder, SETTINGS, json.dumps({"settings": list(job.settings)}) + "\n")
    folders = "".join(f"{job.directory.resolve()}\n" for job in jobs)
    replace_inside(directory, FOLDERS, folders)
    file = replace_inside(directory, SCRIPT, text, mode=0o600)
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise UserError(f"sbatch does not take the array: {said}; the script is {file}")
    array = done.stdout.strip().partition(";")[0]
    replace_inside(directory, SUBMITTED, json.dumps({"array": array}) + "\n")
    return (
        f"array {array} of {len(jobs)} jobs is in the queue; what job N of it says will be in"
        f" {directory}/slurm-{array}_N.out; the same command with hydra.sweep.dir={directory} shows"
        " the table, and submits what is not done by then"
    )


def refuse_while_queued(directory: Path) -> None:
    """Refuses to submit jobs a second time.

    Raises:
        UserError: tasks of the last array wait or run still, or squeue cannot tell.
    """
    record = directory / SUBMITTED
    if not record.is_file():
        return
    try:
        array = str(json_object(record, follow=False)["array"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{record} cannot be read ({error}); remove it") from error
    if not array.isdigit() or shutil.which("squeue") is None:
        return
    asked = ["squeue", "--noheader", f"--jobs={array}"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=QUEUE_S)
    # squeue fails on the number of an array that ended long ago.
    if told.returncode == 0 and told.stdout.strip():
        left = len(told.stdout.strip().splitlines())
        raise UserError(
            f"hydra.sweep.dir={directory}: {left} tasks of its array {array} are in the queue"
            f" still; wait for them, or scancel {array}"
        )

"""launch=slurm: a batch script that starts the same command on every machine of a job.

    the command         check -> run directory -> slurm.sh in it -> sbatch
    the job             one task a machine: python -m trainer --in-job NUMBER HOST:PORT SETTINGS
    each task           check again, where the ranks will be -> as launch=local, or as
                        launch=multinode where the job has several machines

Who stops a job decides whether it comes back. Before its time is up Slurm warns the batch script
with SIGUSR1: the ranks save and the script puts the job back. A job that Slurm preempts gets
SIGTERM, saves, and is put back by Slurm (--requeue). One that was cancelled gets SIGTERM too,
saves, and stays cancelled: so the script itself never puts a job back after SIGTERM.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.config.finding import Finding
from trainer.config.own.folders import own_words
from trainer.config.schema import Config, LaunchConfig
from trainer.errors import UserError
from trainer.files.safe_files import replace_inside

IN_JOB = "--in-job"  # hidden: number of the machine, HOST:PORT of the first, then a run's settings
SCRIPT = "slurm.sh"
OWN = ("run_dir", "launch.dry_run")  # what the job is told in other words than the user's
KEYS = ("partition", "account", "time", "gpus", "cores", "requeue", "options", "setup")
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
WARNING_S = 60  # Slurm looks at the clock once a minute


def check_slurm(config: Config) -> Iterator[Finding]:
    """Checks that a config can be a batch job, and that the job could go on where it stopped."""
    launch = config.launch
    if config.parallel.ranks % launch.nodes:
        yield ranks_per_node_finding(config)
    if launch.time is not None and not TIME.fullmatch(launch.time):
        yield Finding(
            "launch.time",
            launch.time,
            "must be a time that sbatch takes",
            "write minutes, or for example 12:00:00 or 2-12:00",
        )
    if launch.requeue and config.resume == "never":
        yield Finding(
            "resume",
            config.resume,
            "a job that is put back has to resume",
            "use resume=auto, or launch.requeue=false",
            causes=("launch.requeue",),
        )
    if launch.requeue and not config.checkpoint.every:
        yield Finding(
            "checkpoint.every",
            config.checkpoint.every,
            "saves nothing, so a job that is put back would begin again",
            "use for example checkpoint.every=100, or launch.requeue=false",
            causes=("launch.requeue",),
        )
    for option in launch.options:
        if not option.startswith("-") or not option.isprintable():
            yield Finding(
                "launch.options",
                option,
                "options of sbatch begin with -, one line each",
                "put commands into launch.setup",
            )
    if not launch.dry_run and shutil.which("sbatch") is None:
        yield Finding(
            "launch",
            "slurm",
            "the job is handed to sbatch, which is not on PATH",
            "use a machine that submits jobs, or see the script with launch.dry_run=true",
        )


def ranks_per_node_finding(config: Config) -> Finding:
    """Returns the finding about ranks that do not divide among the machines."""
    return Finding(
        "launch.nodes",
        config.launch.nodes,
        f"{config.parallel.ranks} ranks do not divide among {config.launch.nodes} machines",
        "change parallel.data or launch.nodes",
        causes=("parallel.context", "parallel.data"),
    )


def here(config: Config, number: int, endpoint: str) -> Config:
    """Returns the config of a task within the job, which is started locally or as multinode."""
    wish = config.launch
    several = wish.nodes > 1
    usual = {key: getattr(LaunchConfig(), key) for key in KEYS}
    place = {"node_rank": number, "rdzv_endpoint": endpoint} if several else {}
    launch = wish.model_copy(update={**usual, **place, "name": "multinode" if several else "local"})
    return config.model_copy(update={"launch": launch})


def submit(config: Config, path: Path, words: Sequence[str]) -> str:
    """Writes the script into the run directory and hands it to sbatch; returns a report.

    Raises:
        UserError: the script cannot be written, or sbatch does not take it.
    """
    file = path / SCRIPT
    try:
        replace_inside(
            path, SCRIPT, script(config, path, words), mode=0o600
        )  # launch.setup may hold secrets
    except OSError as error:
        raise UserError(
            f"run_dir={path} cannot be written: {error.strerror}; choose another run_dir"
        ) from error
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise UserError(f"sbatch does not take the job: {said}; the script is {file}")
    job = done.stdout.strip().partition(";")[0]
    return (
        f"job {job} is in the queue; what it says will be in {path / f'slurm-{job}.out'}, its"
        f" script is {file}"
    )


def script(config: Config, path: Path, words: Sequence[str]) -> str:
    """Returns the batch script.

    Args:
        config: the checked config.
        path: the run directory, absolute.
        words: the settings as the user gave them.
    """
    return "\n".join(
        ["#!/bin/bash", *_options(config, path), "", *_commands(config, path, words), ""]
    )


def _options(config: Config, path: Path) -> Iterator[str]:
    wish = config.launch
    ranks = config.parallel.ranks // wish.nodes
    gpus = ranks if wish.gpus is None else wish.gpus
    output = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    asked = {
        "job-name": config.name,
        "nodes": wish.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": ranks * wish.cores,
        "gpus-per-node": gpus or None,
        "partition": wish.partition,
        "account": wish.account,
        "time": wish.time,
        "output": f'"{output}/slurm-%j.out"',
        "open-mode": "append",
    }
    yield from (f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None)
    yield "#SBATCH --requeue" if wish.requeue else "#SBATCH --no-requeue"
    yield f"#SBATCH --signal=B:USR1@{wish.grace_s + WARNING_S}"
    yield from (f"#SBATCH {option}" for option in wish.options)


def _commands(config: Config, path: Path, words: Sequence[str]) -> Iterator[str]:
    wish = config.launch
    each = config.parallel.ranks // wish.nodes * wish.cores
    quoted = str(path).replace("\\", "\\\\").replace("'", "\\'")
    kept = own_words()
    kept += [word for word in words if word.lstrip("+").partition("=")[0] not in OWN]
    settings = [*kept, f"run_dir='{quoted}'"]
    start = f'exec {shlex.quote(sys.executable)} -u -m trainer {IN_JOB} "$SLURM_NODEID" "$@"'
    again = "yes" if wish.requeue else ""
    yield f"cd {shlex.quote(str(Path.cwd()))} || exit 1"
    yield from wish.setup
    yield f"""first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
step='' warned=''
trap 'warned={again}; [ -z "$step" ] || kill -TERM "$step"' USR1  # time is nearly up
trap '[ -z "$step" ] || kill -TERM "$step"' TERM  # preempted or cancelled
# a task that is done leaves the others {wish.grace_s} s to save
srun --nodes={wish.nodes} --ntasks={wish.nodes} --cpus-per-task={each} \\
    --kill-on-bad-exit=0 --wait={wish.grace_s} \\
    bash -c {shlex.quote(start)} task "$first:$((20000 + SLURM_JOB_ID % 20000))" \\
    {shlex.join(settings)} &
step=$!
wait "$step"
while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal ends the wait, not the ranks
wait "$step"
status=$?
if [ "$status" -eq 143 ] && [ -n "$warned" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status\""""

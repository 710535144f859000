"""A sweep on Slurm is one array: each task runs one job and notes how it ended, and the same
command again submits what is left. Slurm's commands are shell scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import ROOT
from tests.trainer.launch.test_slurm import TOOLS, cluster  # noqa: F401
from trainer.errors import UserError
from trainer.sweep.jobs import Job, outcome
from trainer.sweep.record_outcome import record_outcome
from trainer.sweep.sweep import run_sweep

SMALL = (
    "context_length=64",
    "batch_tokens=64",
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "steps=2",
    "wandb.mode=disabled",
    "launch=slurm",
    "launch.gpus=0",
    "launch.cores=1",
)
# In the place of the interpreter: the trainer ends with the number of its seed, 1 as 0; the record
# of how it ended is the real one.
PYTHON = f"""#!/bin/bash
printf "%s\\n" "python $*" >> "$LOG"
case "$*" in
    *record_outcome*) PYTHONPATH={ROOT} exec {sys.executable} "$@" ;;
    *seed=2*) exit 3 ;;
    *seed=3*) exit 143 ;;
esac
"""


@pytest.fixture
def home(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    tools = cluster / "bin"
    (tools / "python").write_text(PYTHON)
    (tools / "squeue").write_text(f"#!/bin/bash\n{TOOLS['sbatch'].splitlines()[0]}\necho $QUEUED\n")
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("QUEUED", "")
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    return cluster


def sweep(home: Path, *words: str) -> int:
    return run_sweep(["-m", *SMALL, f"hydra.sweep.dir={home / 'all'}", *words])


def run_task(home: Path, task: int) -> int:
    """Runs a task of the array, as Slurm would."""
    variables = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "7007"}
    script = ["bash", str(home / "all" / "slurm_array.sh")]
    return subprocess.run(script, cwd="/", env={**os.environ, **variables}).returncode


def logged(home: Path, tool: str) -> list[str]:
    return [line for line in (home / "log").read_text().splitlines() if line.startswith(tool)]


def test_tasks_run_their_jobs_and_what_is_not_done_is_submitted_again(
    home: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("seed=1,2,3", "hydra.launcher.ranks=2", "launch.time=2:00:00")
    assert sweep(home, *words) == 0
    assert "array 7007 of 3 jobs is in the queue" in capsys.readouterr().out
    text = (home / "all" / "slurm_array.sh").read_text()
    assert "#SBATCH --array=0-2%2\n" in text and "#SBATCH --time=2:00:00\n" in text
    assert text.count("--output=") == 1 and f"{home}/all/slurm-%A_%a.out" in text
    codes = [run_task(home, task) for task in range(3)]
    jobs = [Job(number, (), home / "all" / str(number)) for number in range(3)]
    ends = {}
    for job in jobs:
        told = json.loads((job.directory / "outcome.json").read_text())
        seed = int("".join(told["settings"]).partition("seed=")[2][0])
        assert told["code"] == {1: 0, 2: 3, 3: 143}[seed] == codes[job.number]
        ends[seed] = told["outcome"]
    assert ends == {1: "done", 2: "failed", 3: "stopped"}
    ran = [line for line in logged(home, "python") if "--in-job" in line]
    assert len(ran) == 3 and all(f"run_dir='{home}/all/" in line for line in ran)
    # A task that waits or runs is not submitted a second time.
    os.environ["QUEUED"] = "7007_2"
    with pytest.raises(UserError, match=r"1 tasks of its array 7007 are in the queue still"):
        sweep(home, *words)
    os.environ["QUEUED"] = ""
    assert sweep(home, *words) == 0
    assert "array 7007 of 2 jobs is in the queue" in capsys.readouterr().out
    assert "--array=0-1%2" in (home / "all" / "slurm_array.sh").read_text()


def test_a_dry_run_shows_the_script_and_submits_nothing(
    home: Path, capsys: pytest.CaptureFixture
) -> None:
    assert sweep(home, "seed=1,2", "launch.dry_run=true") == 0
    told = capsys.readouterr().out
    assert "#SBATCH --array=0-1\n" in told and "nothing was started" in told
    assert not (home / "log").exists() and not (home / "all").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("parallel.context=1,2",), "job 0 and job 1 differ in --cpus-per-task=1"),
        (("seed=1,2", "launch.partition=a,b"), "differ in --partition=a, --partition=b"),
    ],
)
def test_jobs_that_are_no_one_array_are_refused(
    home: Path, words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        sweep(home, *words)
    assert not (home / "log").exists()


def test_an_array_that_slurm_does_not_take_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULL", "yes")
    with pytest.raises(UserError, match="does not take the array: QOSMaxSubmitJobPerUserLimit"):
        sweep(home, "seed=1,2")


def test_seconds_of_several_starts_add_up(tmp_path: Path) -> None:
    (tmp_path / "slurm_job.json").write_text('{"settings": ["seed=1"]}')
    record_outcome(tmp_path, 143, 5.0)
    assert record_outcome(tmp_path, 0, 2.5).seconds == 7.5
    told = outcome(Job(0, ("seed=1",), tmp_path))
    assert told is not None and told.outcome == "done"

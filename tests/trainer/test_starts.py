"""`python -m trainer` started by srun, mpirun or deepspeed's launcher is one run, and open to
nobody else; or is refused."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import forked_python
from tests.trainer.launch.test_elastic import ROOT, open_to_others
from trainer.logs.jsonl import METRICS, read

SMALL = [
    "data=copy",
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "context_length=64",
    "batch_tokens=256",
]
SMALL += [
    "evaluation.every=0",
    "checkpoint.every=0",
    "wandb.mode=disabled",
    "log.plots=false",
    "log.every=1",
]


def begin(
    words: list[str], start_process: Any = forked_python.Popen, **variables: object
) -> subprocess.Popen:
    given = {key: str(value) for key, value in variables.items()}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **given}
    command = [sys.executable, "-m", "trainer", *words]
    pipe = subprocess.PIPE
    return start_process(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=environment)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def until_a_step(process: subprocess.Popen) -> None:
    for line in process.stdout:  # pyright: ignore[reportOptionalIterable]
        if line.startswith("step "):
            return
    pytest.fail(f"no step was taken: {process.communicate()[1]}")


@pytest.mark.slow
@pytest.mark.full
def test_two_processes_of_srun_are_two_ranks_of_one_run(tmp_path: Path) -> None:
    words = [*SMALL, "steps=3", "parallel.context=2", f"run_dir={tmp_path / 'run'}"]
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "SLURM_NTASKS": 2,
        "SLURM_STEP_ID": 0,
    }
    tasks = [
        begin(words, subprocess.Popen, SLURM_PROCID=rank, SLURM_LOCALID=rank, **place)
        for rank in range(2)
    ]
    ends = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], ends
    assert [row["step"] for row in read(tmp_path / "run" / METRICS)] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"] == 2
    assert "finished" in ends[0][0] and ends[1][0] == ""
    # Whatever one rank says, no other says as well.
    lines = [line for line in ends[0][0].splitlines() if line]
    assert len(lines) == len(set(lines)), ends[0][0]


@pytest.mark.slow
def test_a_start_that_does_not_say_where_to_meet_is_refused_once(tmp_path: Path) -> None:
    words = [*SMALL, "steps=3", f"run_dir={tmp_path / 'run'}"]
    tasks = [begin(words, OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_SIZE=2) for rank in range(2)]
    ends = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2], ends
    said = "".join(err for _, err in ends)
    assert (
        said.count("mpirun started 2 processes") == 1
        and "launch=multinode" in said
        and "Traceback" not in said
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nothing_of_a_whole_run_listens_beyond_its_machine(tmp_path: Path) -> None:
    words = [
        *SMALL,
        "steps=100000",
        "parallel.context=2",
        f"run_dir={tmp_path / 'run'}",
        "wandb.mode=offline",
    ]
    process = begin(words)
    try:
        until_a_step(process)
        assert open_to_others(psutil.Process(process.pid)) == []
    finally:
        process.terminate()
        process.communicate(timeout=60)


def outside(folder: Path) -> list[str]:
    """Names of what W&B made in a folder for temporary files."""
    return [path.name for path in folder.iterdir() if "wandb" in path.name]


@pytest.mark.slow
def test_a_killed_rank_leaves_no_files_of_wandb_outside_and_the_next_start_clears_its_own(
    tmp_path: Path,
) -> None:
    own, run = tmp_path / "tmp", tmp_path / "run"
    own.mkdir()
    words = [*SMALL, f"run_dir={run}", "wandb.mode=offline"]
    process = begin([*words, "steps=100000"], TMPDIR=own)
    until_a_step(process)
    psutil.Process(process.pid).children()[0].kill()
    assert "was killed by SIGKILL" in process.communicate(timeout=120)[1]
    left = set((run / "wandb" / "tmp").iterdir())
    assert left, "W&B made no folder, so nothing was tried"
    # W&B's monitor of the machine outlives the rank, and takes its socket away when it notices.
    end = time.monotonic() + 30
    while outside(own) and time.monotonic() < end:
        time.sleep(0.1)
    assert outside(own) == []
    again = begin([*words, "steps=100000"], TMPDIR=own)
    until_a_step(again)
    assert not left & set((run / "wandb" / "tmp").iterdir())
    again.terminate()
    again.communicate(timeout=120)

"""Jobs of a sweep fill every machine of a Slurm allocation, each with GPUs of its own, and none
outlives the sweep. Slurm's commands are shell scripts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import forked_python
from tests.test_architecture import ROOT
from trainer.errors import UserError
from trainer.sweep import machines
from trainer.sweep.batch import PARENT
from trainer.sweep.jobs import Job, outcome
from trainer.sweep.machines import Machine, Slots, machines_here
from trainer.sweep.sweep import run_sweep

SMALL = (
    *("context_length=64", "batch_tokens=64", "model.width=16", "model.layers=1"),
    *("model.heads=2", "steps=2"),
)
# A job notes where it is, and waits until as many run as TOGETHER says.
STUB = """
import json, os, sys, time
from pathlib import Path
home, words = Path(sys.argv[1]), sys.argv[4:]
told = dict(word.split("=", 1) for word in words)
place = {key: os.environ.get(key) for key in ("NODE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
place["of"] = sys.argv[3]
(home / f"runs{told['seed']}").write_text(json.dumps(place))
end = time.monotonic() + 30
while len(list(home.glob("runs*"))) < int(os.environ["TOGETHER"]) and time.monotonic() < end:
    time.sleep(0.02)
mine = json.loads((home / f"runs{told['seed']}").read_text())
mine["beside"] = sorted(path.name for path in home.glob("runs*"))
(home / f"ran{told['seed']}").write_text(json.dumps(mine))
(home / f"runs{told['seed']}").unlink()
"""
# As the real one: GPUs of the step are those of the allocation, numbered from 4 on here.
SRUN = """#!/bin/bash
while [ "${1#-}" != "$1" ]; do
    echo "$1" >> "$LOG"
    case $1 in --nodelist=*) NODE=${1#*=};; esac
    shift
done
export NODE CUDA_VISIBLE_DEVICES=4,5
exec "$@"
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[8-9]" ] && printf "node8\\nnode9\\n"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An allocation of two machines with two GPUs and eight cores each."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "stub.py").write_text(STUB)
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "7007",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[8-9]",
        "SLURM_JOB_CPUS_PER_NODE": "8(x2)",
        "SLURM_GPUS_ON_NODE": "2",
        "TOGETHER": "4",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("OMP_NUM_THREADS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(home: Path, *words: str) -> int:
    command = [sys.executable, str(home / "stub.py"), str(home)]
    return run_sweep(["-m", *SMALL, f"hydra.sweep.dir={home / 'all'}", *words], command)


def json_of(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.full  # four jobs at once start four interpreters
def test_every_machine_carries_as_many_jobs_as_it_has_gpus(
    home: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(home, "seed=1,2,3,4") == 0
    told = capsys.readouterr().out
    assert "up to 4 ranks at once on 2 machines of the allocation (node8, node9)" in told
    found = [json_of(home / f"ran{seed}") for seed in (1, 2, 3, 4)]
    places = sorted((each["NODE"], each["CUDA_VISIBLE_DEVICES"]) for each in found)
    assert places == [("node8", "4"), ("node8", "5"), ("node9", "4"), ("node9", "5")]
    assert {each["OMP_NUM_THREADS"] for each in found} == {"4"}
    assert {each["of"] for each in found} == {PARENT}
    # The first that ended saw all four.
    assert max(len(each["beside"]) for each in found) == 4
    asked = set((home / "log").read_text().split())
    assert {"--nodes=1", "--ntasks=1", "--overlap", "--cpus-per-task=8"} <= asked


def test_a_machine_gets_another_job_when_one_ends_and_ranks_limit_all_together(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOGETHER", "1")
    assert run(home, "seed=1,2,3", "hydra.launcher.ranks=2") == 0
    found = [json_of(home / f"ran{seed}") for seed in (1, 2, 3)]
    assert all(len(each["beside"]) <= 2 for each in found)
    assert {each["CUDA_VISIBLE_DEVICES"] for each in found} == {"4"}
    assert {each["NODE"] for each in found} == {"node8", "node9"}


def test_a_signal_reaches_the_jobs_through_srun(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOGETHER", "9")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from trainer.sweep.sweep import run_sweep
sys.exit(run_sweep(sys.argv[1:], [sys.executable, {str(home / "stub.py")!r}, {str(home)!r}]))
"""
    words = ("-m", *SMALL, f"hydra.sweep.dir={home / 'all'}", "seed=1,2,3,4,5")
    pipe = subprocess.PIPE
    process = forked_python.Popen(
        [sys.executable, "-c", code, *words], stdout=pipe, stderr=pipe, text=True, cwd=ROOT
    )
    end = time.monotonic() + 60
    while len(list(home.glob("runs*"))) < 4:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert not list(home.glob("ran*"))
    for number in range(4):
        job = Job(number, (*SMALL, f"seed={number + 1}"), home / "all" / str(number))
        told_of = outcome(job)
        assert told_of is not None and told_of.outcome == "stopped"


def test_a_job_of_another_machine_is_a_run() -> None:
    job = ("--job-of", PARENT, *SMALL, "wandb.mode=disabled", "launch.dry_run=true")
    done = forked_python.run([sys.executable, "-m", "trainer", *job], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "nothing was started" in done.stdout


def test_slots_are_spread_and_given_back() -> None:
    two = [Machine("a", 8, ("0", "1")), Machine("b", 8, ("0", "1"))]
    slots = Slots(None, two)
    assert slots.many == 4
    first = slots.take(1)
    second = slots.take(1)
    assert (first.machine.name, second.machine.name) == ("a", "b")
    # Two free GPUs, on two machines: no room for a job of two.
    assert slots.fit(1) and not slots.fit(2)
    slots.give(first)
    assert slots.take(2).gpus == ("1", "0")
    assert slots.fit(1) and not slots.fit(2)


def test_ranks_have_room_or_run_alone() -> None:
    here = [Machine(None, 2, ())]
    slots = Slots(2, here)
    assert slots.fit(3)
    place = slots.take(1)
    assert place.command(["x", "y"]) == ["x", "y"]
    assert slots.fit(1) and not slots.fit(2)
    slots.give(place)
    assert slots.fit(2)


def test_gpus_of_this_machine_are_named_to_the_job() -> None:
    slots = Slots(2, [Machine(None, 8, ("3", "7", "9"))])
    assert slots.take(1).environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert slots.take(1).environment["CUDA_VISIBLE_DEVICES"] == "7"
    assert not slots.fit(1)


def test_more_ranks_than_gpus_are_refused() -> None:
    two = [Machine("a", 8, ("0",)), Machine("b", 8, ("0",))]
    with pytest.raises(UserError, match=r"ranks=3, but the 2 machines have 2 GPUs; use at most 2"):
        Slots(3, two)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_NUM_NODES": "1"},
        {"SLURM_JOB_NUM_NODES": ""},
        {"SLURM_STEP_ID": "3"},
    ],
)
def test_one_machine_or_a_step_of_the_users_own_is_this_machine(
    home: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    [machine] = machines_here()
    assert machine.name is None


def test_a_shell_of_salloc_has_the_whole_allocation(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", str(0xFFFFFFFA))
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "16,4")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "a100:3")
    found = machines_here()
    assert [(each.name, each.cores) for each in found] == [("node8", 16), ("node9", 4)]
    assert found[0].gpus == found[1].gpus == ("0", "1", "2")


def test_an_allocation_without_its_commands_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"SLURM_JOB_NUM_NODES=2: .* srun, which is not on PATH"):
        machines_here()


def test_machines_that_scontrol_does_not_name_are_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "other")
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST=other: scontrol does not name"):
        machines_here()

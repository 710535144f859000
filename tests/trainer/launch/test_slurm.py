"""launch=slurm: what sbatch is handed, and what the job does with it, on a machine whose Slurm is a
few shell scripts."""

import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import __main__ as trainer
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.launch import slurm
from trainer.preflight import prepare
from trainer.preflight.check import check_config
from trainer.sweep.batch import check_jobs
from trainer.sweep.hydra_launcher import SweepPlan
from trainer.sweep.jobs import Job

WORDS = (
    "launch=slurm",
    "launch.nodes=2",
    "parallel.context=4",
    "model.width=32",
    "model.layers=1",
    "wandb.mode=disabled",
)
RECORD = 'printf "%s\\n" "$(basename "$0") $*" >> "$LOG"\n'
TOOLS = {
    "sbatch": RECORD
    + '[ -n "$FULL" ] && { echo "QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }; echo "7007;cluster"',
    "scontrol": RECORD + '[ "$1" = show ] && printf "node8\\nnode9\\n"',
    # a task on each machine; signals go to all of them, and the worst exit status is srun's
    "srun": RECORD
    + """while [ "${1#-}" != "$1" ]; do case $1 in --ntasks=*) tasks=${1#*=};; esac; shift; done
for node in $(seq 0 $((tasks - 1))); do SLURM_NODEID=$node "$@" & all="$all $!"; done
trap 'kill -TERM $all' TERM
for task in $all; do
    wait "$task"; while kill -0 "$task" 2>/dev/null; do wait "$task"; done; wait "$task"; code=$?
    [ "$code" -gt "${worst:-0}" ] && worst=$code
done
exit "${worst:-0}\"""",
    # in the place of the trainer: ends at once, with END, or sleeps until it has to save
    "python": RECORD
    + """[ -n "$END" ] && exit "$END"
trap 'exit 143' TERM
while :; do sleep 0.05; done""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds `log`, what every tool was called with; the tools are first on PATH."""
    home = tmp_path / "bin"
    home.mkdir()
    for name, text in TOOLS.items():
        (home / name).write_text(f"#!/bin/bash\n{text}\n")
        (home / name).chmod(0o755)
    usual = {
        "PATH": f"{home}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "FULL": "",
        "END": "",
    }
    for key, value in {**usual, "SLURM_JOB_NODELIST": "node[8-9]", "SLURM_JOB_ID": "7007"}.items():
        monkeypatch.setenv(key, value)
    return tmp_path


@functools.cache
def composed(*words: str) -> Config:
    wish = compose([*WORDS, *words])
    assert not wish.faults and wish.config is not None
    return wish.config


def faults(*words: str) -> list[str]:
    wish = compose(list(words))
    assert wish.config is not None
    return check_config(wish.config, wish.given, wish.mended, wish.faults)


def directives(text: str) -> list[str]:
    return [
        line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")
    ]


def test_sbatch_is_told_of_machines_time_and_the_warning_before_its_end() -> None:
    more = (
        "launch.partition=gpu",
        "launch.account=lab",
        "launch.time=2-12:00",
        "launch.cores=3",
        "launch.grace_s=90",
    )
    text = slurm.script(
        composed(*more, "launch.options=['--qos=low']", "name=mine"),
        Path("/shared/a 100%/run"),
        WORDS,
    )
    assert directives(text) == [
        "--job-name=mine",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=6",
        "--gpus-per-node=2",
        "--partition=gpu",
        "--account=lab",
        "--time=2-12:00",
        '--output="/shared/a 100%%/run/slurm-%j.out"',
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@150",
        "--qos=low",
    ]
    assert text.startswith("#!/bin/bash\n#SBATCH"), (
        "sbatch stops reading its options at the first command"
    )


def test_what_is_not_asked_for_is_left_to_slurm() -> None:
    told = directives(
        slurm.script(composed("launch.gpus=0", "launch.requeue=false"), Path("/run"), WORDS)
    )
    assert "--no-requeue" in told and "--requeue" not in told
    assert not [
        each for each in told if each.startswith(("--gpus", "--partition", "--account", "--time"))
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("parallel.context=3",), "launch.nodes=2: 3 ranks do not divide among 2 machines"),
        (("launch.time=soon",), "launch.time=soon: must be a time that sbatch takes"),
        (("launch.time=1:2:3:4",), "launch.time=1:2:3:4: must be a time that sbatch takes"),
        (("resume=never",), "resume=never: a job that is put back has to resume"),
        (("checkpoint.every=0",), "checkpoint.every=0: saves nothing"),
        (("launch.options=[qos]",), "launch.options=qos: options of sbatch begin with -"),
        (
            ("launch.node_rank=0",),
            "launch.node_rank=0: is for several machines, but launch=slurm; use launch=multinode",
        ),
        (
            ("launch.name=local", "launch.nodes=1", "launch.cores=2"),
            "launch.cores=2: is for a batch job, but launch=local",
        ),
    ],
)
def test_jobs_that_could_not_run_or_go_on_are_refused(
    cluster: Path, words: tuple[str, ...], message: str
) -> None:
    found = faults(*WORDS, *words)
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    "path", ["/shared/a\n#SBATCH --uid=0\n", "/shared/a\rb", "/shared/a\u2028b", "a\x1b[2J"]
)
def test_a_run_directory_that_would_begin_a_line_of_its_own_is_refused(
    cluster: Path, path: str
) -> None:
    for words in (WORDS, WORDS[2:]):
        asked = composed(*words) if words is WORDS else compose(list(words)).config
        assert (
            asked is not None
            and check_config(asked.model_copy(update={"run_dir": "/shared/a ü=b"})) == []
        )
        found = check_config(asked.model_copy(update={"run_dir": path}))
        assert len(found) == 1 and "control character" in found[0] and found[0].isprintable()


def test_a_job_that_never_comes_back_need_not_resume(cluster: Path) -> None:
    assert (
        faults(*WORDS)
        == []
        == faults(*WORDS, "launch.requeue=false", "resume=never", "checkpoint.every=0")
    )


def test_without_sbatch_only_the_script_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert [each.split(";")[0] for each in faults(*WORDS)] == [
        "launch=slurm: the job is handed to sbatch, which is not on PATH"
    ]
    assert faults(*WORDS, "launch.dry_run=true") == []


def test_ranks_are_not_counted_against_the_machine_that_only_submits(cluster: Path) -> None:
    assert faults(*WORDS, "parallel.data=4096", "batch_tokens=8388608") == []


def test_a_dry_run_prints_the_script_and_leaves_no_trace(
    cluster: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [*WORDS, f"run_dir={cluster / 'run'}", "launch.dry_run=true"]
    assert trainer.main(words) == 0
    told = capsys.readouterr().out
    assert told.startswith("#!/bin/bash") and told.endswith(
        "# nothing was submitted (launch.dry_run=true)\n"
    )
    assert "dry_run=true" not in told.partition("# nothing")[0], "the job itself is no dry run"
    assert not (cluster / "log").exists() and not (cluster / "run").exists()


def test_sbatch_gets_the_script_of_the_run_directory_and_may_refuse_it(
    cluster: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cluster / "run"
    assert trainer.main([*WORDS, f"run_dir={path}"]) == 0
    assert (cluster / "log").read_text() == f"sbatch --parsable {path / slurm.SCRIPT}\n"
    assert (
        f"job 7007 is in the queue; what it says will be in {path / 'slurm-7007.out'}"
        in capsys.readouterr().out
    )
    assert not prepare.run_dir.holds_run(path), "the run is recorded where it runs"
    monkeypatch.setenv("FULL", "yes")
    with pytest.raises(
        UserError,
        match=(
            r"sbatch does not take the job: QOSMaxSubmitJobPerUserLimit; the script is .*slurm.sh"
        ),
    ):
        slurm.submit(composed(), path, WORDS)


def test_a_batch_script_is_its_owners_alone(cluster: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    slurm.submit(composed(), path, WORDS)
    assert (path / slurm.SCRIPT).stat().st_mode & 0o777 == 0o600


def test_a_search_that_waits_for_its_jobs_is_refused(cluster: Path) -> None:
    job = Job(0, (*WORDS, "seed=1"), cluster / "job")
    with pytest.raises(UserError, match="launch=slurm hands jobs over and does not wait"):
        check_jobs([job], [], SweepPlan(cluster, [*WORDS], None, True), {})


@pytest.mark.parametrize(("nodes", "name"), [(1, "local"), (2, "multinode")])
def test_within_the_job_it_is_the_same_run_on_this_machine_or_on_one_of_several(
    nodes: int, name: str, tmp_path: Path
) -> None:
    asked = composed(
        f"launch.nodes={nodes}",
        "launch.partition=gpu",
        "launch.setup=['true']",
        f"run_dir={Path.cwd()}/none",
    )
    found = slurm.here(asked, 0, "node8:27007")
    assert found.launch.name == name and check_config(found) == []
    assert found.model_copy(update={"launch": asked.launch}) == asked
    if nodes > 1:
        assert prepare.rendezvous_of(found, tmp_path).endpoint == "node8:27007"  # pyright: ignore


def started(cluster: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> subprocess.Popen:
    """The script in the hands of bash, as Slurm would run it."""
    monkeypatch.setattr(sys, "executable", str(cluster / "bin" / "python"))
    file = cluster / "slurm.sh"
    file.write_text(
        slurm.script(composed(*words), cluster / "it's a run", [*WORDS, *words, "run_dir=other"])
    )
    return subprocess.Popen(["bash", str(file)], cwd="/")


def calls(cluster: Path, tool: str, many: int) -> list[list[str]]:
    """What a tool was called with, once it was called `many` times."""
    end = time.monotonic() + 60
    while True:
        log = cluster / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        if (
            len(found := [line for line in lines if line.startswith(tool)]) >= many
            or time.monotonic() > end
        ):
            return [line.split(" ", 1)[1].split() for line in found]
        time.sleep(0.02)


@pytest.mark.parametrize("end", ["0", "3"])
def test_every_machine_is_given_the_settings_its_number_and_the_first_machine(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("END", end)
    assert started(
        cluster, monkeypatch, "launch.setup=['export MARK=1','echo ready > \"$LOG.$MARK\"']"
    ).wait(60) == int(end)
    found = sorted((cluster / "log").read_text().splitlines())
    tasks = [line for line in found if line.startswith("python")]
    assert len(tasks) == 2
    for number, task in enumerate(tasks):
        told = task.removeprefix(f"python -u -m trainer {slurm.IN_JOB} ")
        assert told.startswith(
            f"{number} node8:27007 launch=slurm launch.nodes=2 parallel.context=4 "
        )
        quoted = "it\\'s a run"
        assert told.endswith(f" run_dir='{cluster}/{quoted}'") and "run_dir=other" not in told
    assert "--nodes=2 --ntasks=2 --cpus-per-task=8 --kill-on-bad-exit=0 --wait=60" in shlex.join(
        calls(cluster, "srun", 1)[0]
    )
    assert (cluster / "log.1").read_text() == "ready\n"
    assert not [line for line in found if "requeue" in line]


def test_the_path_of_the_run_arrives_as_it_was_given(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quoted = str(cluster / "it's a run").replace("'", "\\'")
    assert composed(f"run_dir='{quoted}'").run_dir == str(cluster / "it's a run")


@pytest.mark.parametrize(
    ("number", "words", "back"),
    [
        (signal.SIGUSR1, (), True),  # time is nearly up
        (signal.SIGUSR1, ("launch.requeue=false",), False),
        (signal.SIGTERM, (), False),  # cancelled, or preempted: Slurm itself knows which
    ],
)
def test_a_warned_job_saves_and_is_put_back_and_a_cancelled_one_is_not(
    cluster: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    words: tuple[str, ...],
    back: bool,
) -> None:
    process = started(cluster, monkeypatch, *words)
    try:
        assert len(calls(cluster, "python", 2)) == 2
        time.sleep(0.2)  # the stand-ins set their traps
        process.send_signal(number)
        assert process.wait(60) == 143
        requeued = [call for call in calls(cluster, "scontrol", 1) if call[0] == "requeue"]
        assert requeued == ([["requeue", "7007"]] if back else [])
    finally:
        process.kill()


def test_a_warned_job_whose_ranks_failed_is_not_put_back(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cluster / "bin" / "python").write_text(
        f"#!/bin/bash\n{RECORD}trap 'exit 3' TERM\nwhile :; do sleep 0.05; done\n"
    )
    process = started(cluster, monkeypatch)
    assert len(calls(cluster, "python", 2)) == 2
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 3
    assert [call[0] for call in calls(cluster, "scontrol", 1)] == ["show"]

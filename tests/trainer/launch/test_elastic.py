"""Ranks are started, told who they are, stopped with their launcher, and heard once when they
fail."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import forked_python

ROOT = Path(__file__).resolve().parents[3]

LAUNCHER = """
import sys
from pathlib import Path
from trainer.launch.elastic import start_ranks
scratch, restarts, *command = sys.argv[1:]
limits = dict(max_restarts=int(restarts), grace_s=10)
end = start_ranks(["-u", *command], ranks=2, scratch=Path(scratch), **limits)
print("END", end.code, end.message, flush=True)
"""

RANK = """
import os, signal, sys, time
from pathlib import Path
launcher, what = os.getppid(), sys.argv[1]
import torch, torch.distributed as dist
from trainer.launch import elastic as launch
from trainer.launch.parent_death import die_with_parent
from trainer.errors import UserError
die_with_parent(launcher)
from trainer.launch.exit_report import SAVED, handling
if launch.already_finished():
    sys.exit(0)
heard = []
listening = handling(SAVED, lambda number, frame: heard.append(launch.asked_by(number)))
listening.__enter__()
try:
    ranks = launch.init_process_group(60)
    n = launch.restart_count()[0]
    total = torch.tensor([1 + ranks.rank])
    dist.all_reduce(total)
    told = ("up", ranks.rank, ranks.size, ranks.local_size, ranks.backend)
    told += ("sum", total.item(), "attempt", n, os.getpid())
    # in one piece: two ranks share the pipe
    os.write(1, (" ".join(map(str, told)) + chr(10)).encode())
    if n == 0 and ranks.rank == 1:
        if what == "bug": raise RuntimeError("a bug of rank one")
        if what == "fault": raise UserError("the disk is full; make room", 3)
        if what == "killed": os.kill(os.getpid(), signal.SIGKILL)
    code = 0
    while what == "wait" or (n == 0 and what in ("bug", "fault", "killed")):
        stop = torch.tensor([len(heard)])
        dist.all_reduce(stop)
        if stop.item():
            time.sleep(0.3)
            code = SAVED[heard[0]] if heard else 143
            break
        time.sleep(0.05)
    dist.destroy_process_group()
    sys.exit(launch.report_exit(code))
except UserError as fault:
    launch.report_failure(fault, fault.code)
    os._exit(fault.code)
except Exception as error:
    launch.report_failure(error, None)
    os._exit(1)
"""


def heed_signals(ignored: tuple[signal.Signals, ...] = ()) -> None:
    """What a shell that started the tests in the background ignores would be ignored by all that
    they start as well."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


@pytest.fixture
def launcher(tmp_path: Path):
    """Start a launcher of two ranks; it is killed at the end of the test."""
    (tmp_path / "rank.py").write_text(RANK)
    started: list[subprocess.Popen] = []

    def begin(
        what: str,
        restarts: int = 0,
        ignored: tuple[signal.Signals, ...] = (),
        start_process: Any = forked_python.Popen,
    ) -> subprocess.Popen:
        command = [
            sys.executable,
            "-c",
            LAUNCHER,
            str(tmp_path / "scratch"),
            str(restarts),
            str(tmp_path / "rank.py"),
            what,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        process = start_process(
            command,
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=environment,
            cwd=ROOT,
            preexec_fn=partial(heed_signals, ignored),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen) -> tuple[str, str]:
    """What the launcher said last, and all that was written to stderr."""
    out, err = process.communicate(timeout=120)
    return out[out.index("END") :].strip(), err


def numbers(process: subprocess.Popen) -> list[int]:
    """Process numbers of both ranks, once they are up."""
    lines = [process.stdout.readline() for _ in range(2)]  # pyright: ignore
    assert all(line.startswith("up") for line in lines), lines
    return [int(line.split()[-1]) for line in lines]


def lives(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ranks_meet_and_end_well_and_leave_nothing_behind(launcher, tmp_path: Path) -> None:
    out, err = launcher("end", start_process=subprocess.Popen).communicate(timeout=120)
    assert "up 0 2 2 gloo sum 3 attempt 0" in out
    assert "up 1 2 2 gloo sum 3 attempt 0" in out
    assert out.strip().endswith("END 0")
    assert err == ""
    assert not (tmp_path / "scratch").exists()


def test_the_ranks_of_a_killed_launcher_are_gone_within_five_seconds(launcher) -> None:
    process = launcher("wait")
    ranks = numbers(process)
    process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 5
    while any(lives(rank) for rank in ranks) and time.monotonic() < end:
        time.sleep(0.05)
    assert [rank for rank in ranks if lives(rank)] == []


def open_to_others(process: psutil.Process) -> list[str]:
    """Sockets of a process and of all that it started which listen beyond the loopback interface,
    or carry data there."""
    sockets = [
        entry
        for each in [process, *process.children(recursive=True)]
        for entry in each.net_connections("inet")
    ]
    assert sockets, "nothing was looked at"
    return [
        str(entry)
        for entry in sockets
        if not entry.laddr.ip.startswith(("127.", "::1", "::ffff:127."))
    ]


def test_no_process_of_a_run_listens_beyond_its_machine(launcher, monkeypatch) -> None:
    monkeypatch.setenv(
        "GLOO_SOCKET_IFNAME", next(name for name in psutil.net_if_addrs() if name != "lo")
    )
    process = launcher("wait")
    numbers(process)
    assert open_to_others(psutil.Process(process.pid)) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.full)],
)
def test_a_signal_reaches_the_ranks_which_save_and_leave(
    launcher, number: signal.Signals, code: int
) -> None:
    process = launcher("wait")
    numbers(process)
    process.send_signal(number)
    if number == signal.SIGTERM:
        time.sleep(0.1)
        process.send_signal(number)  # a second one does not cut the saving short
    said, err = ended(process)
    assert said == f"END {code}"
    assert err == ""


@pytest.mark.parametrize(
    ("ignored", "number", "code"),
    [
        ((signal.SIGINT, signal.SIGQUIT), signal.SIGINT, 143),
        pytest.param((signal.SIGHUP,), signal.SIGHUP, 143, marks=pytest.mark.full),
    ],
)
def test_a_signal_that_was_ignored_when_we_were_started_stays_ignored(
    launcher, ignored, number, code
) -> None:
    process = launcher("wait", ignored=ignored)
    numbers(process)
    process.send_signal(number)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    said, err = ended(process)
    assert said == f"END {code}" and err == ""


@pytest.mark.slow
def test_a_fault_of_one_rank_is_said_once_and_not_tried_again(launcher) -> None:
    said, err = ended(launcher("fault", restarts=2))
    assert said == "END 3 the disk is full; make room"
    assert "Traceback" not in err


def test_a_bug_shows_the_traceback_of_its_rank_once(launcher) -> None:
    said, err = ended(launcher("bug"))
    assert said.startswith("END 1 rank 1 of 2 failed:")
    assert said.endswith("RuntimeError: a bug of rank one")
    assert "Traceback" not in err


def test_a_killed_rank_is_named(launcher) -> None:
    said, _ = ended(launcher("killed"))
    assert said.startswith("END 1 rank 1 of 2 was killed by SIGKILL")


@pytest.mark.slow
def test_after_a_death_all_ranks_start_again_as_often_as_allowed(launcher) -> None:
    out, _ = launcher("killed", restarts=1).communicate(timeout=120)
    assert out.count("attempt 1") == 2
    assert out.strip().endswith("END 0")

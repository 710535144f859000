"""A rank that hangs is named, with the place where it hangs; the others do not wait longer than
they were told to."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.test_architecture import ROOT
from tests.trainer.verify.test_killed import STEPS, finish, start, words
from trainer.errors import BAD_RUN
from trainer.logs.jsonl import METRICS, read
from trainer.watchdog import (
    STILL_S,
    Heartbeat,
    HeartbeatNote,
    current_call,
    describe_hang,
    read_heartbeats,
)

NOW = 1000.0


def note(passed=9, step=4, phase="forward", doing="", waits=True, beat=NOW - 1):
    return HeartbeatNote(passed, step, phase, doing, waits, beat)


def test_the_rank_that_stands_still_is_named_before_those_that_are_behind():
    told = describe_hang(
        [note(), note(beat=NOW - STILL_S - 40), note(passed=8)], (4, "forward"), 30, NOW
    )
    assert "rank 1 of 3 stands still: no sign for 45 s, in step 4, forward" in told
    assert "rank 0" not in told and "rank 2" not in told
    assert "launch.timeout_s=30 in step 4, forward" in told


def test_then_the_one_that_is_in_an_earlier_phase_and_then_the_one_that_waits_for_nobody():
    late = describe_hang(
        [
            note(),
            note(),
            note(passed=7, phase="reading the batch", doing="trainer/data/sources/files.py:7"),
        ],
        (4, "x"),
        30,
        NOW,
    )
    assert (
        "rank 2 of 3 did not come: it is in step 4, reading the batch"
        " (trainer/data/sources/files.py:7)" in late
    )
    assert "rank 0" not in late and "rank 1" not in late
    busy = describe_hang(
        [note(), note(waits=False, doing="models/x.py:3"), note()], (4, "x"), 30, NOW
    )
    assert "rank 1 of 3 did not come: it is busy in step 4, forward (models/x.py:3)" in busy
    assert "rank 0" not in busy
    assert "rank 1 of 2 left no word" in describe_hang([note(), None], (4, "x"), 30, NOW)
    every = describe_hang(
        [note(doing="all_reduce at a.py:1"), note(doing="broadcast at b.py:2")], (4, "x"), 30, NOW
    )
    assert (
        "rank 0 of 2 is in step 4, forward (all_reduce at a.py:1)" in every
        and "rank 1 of 2" in every
    )


def test_a_note_tells_the_place_and_the_line_and_whether_its_rank_waits(tmp_path):
    watch = Heartbeat(tmp_path / "notes", 1)
    try:
        watch.heartbeat("reading the batch", 3)
        end = time.monotonic() + 30
        first = read_heartbeats(tmp_path / "notes", 2)[1].beat
        while (
            found := read_heartbeats(tmp_path / "notes", 2)[1]
        ).beat == first and time.monotonic() < end:
            time.sleep(0.05)
        assert found.beat > first, "renewed without a word of the main thread"
        assert read_heartbeats(tmp_path / "notes", 2)[0] is None
        assert (found.passed, found.step, found.phase, found.waits) == (
            1,
            3,
            "reading the batch",
            False,
        )
        assert time.time() - found.beat < STILL_S
    finally:
        watch.close()
    watch.forget()
    assert not (tmp_path / "notes").exists()


def placed(code, path, **names):
    """What `code` defines, taken to lie in the file `path`."""
    exec(compile(code, str(path), "exec"), names)
    return names


def test_who_is_inside_a_collective_waits_and_the_innermost_line_of_ours_is_told():
    theirs = placed(
        "def all_reduce():\n return hear()",
        "/any/torch/distributed/distributed_c10d.py",
        hear=lambda: current_call(sys._getframe(1)),
    )

    def told(room, name, call):
        return placed(f"def f():\n\n\n return {call}()\nfound = f()", ROOT / room / name, **theirs)[
            "found"
        ]

    assert told("trainer", "step_sums.py", "hear") == ("trainer/step_sums.py:4", False)
    assert told("parallel", "collectives.py", "hear") == ("parallel/collectives.py:4", True)
    assert told("trainer", "step_sums.py", "all_reduce") == (
        "all_reduce at trainer/step_sums.py:4",
        True,
    )


def ranks_of(launcher):
    """{rank: process} of a launcher's ranks, without the helpers that it starts beside them."""
    every = {child: child.environ() for child in psutil.Process(launcher).children(recursive=True)}
    return {int(given["RANK"]): child for child, given in every.items() if "RANK" in given}


@pytest.mark.full
def test_a_rank_that_was_stopped_is_named_all_ranks_end_and_nothing_is_lost(tmp_path):
    same = words(
        tmp_path,
        "run",
        "parallel.context=2",
        "engine=fsdp",
        "launch.timeout_s=6",
        "launch.grace_s=1",
    )
    process = start(same, subprocess.Popen)  # a fork would not show which rank it is
    end = time.monotonic() + 240
    while (
        time.monotonic() < end
        and process.poll() is None
        and len(list(read(tmp_path / "run" / METRICS))) < 5
    ):
        time.sleep(0.02)
    every = ranks_of(process.pid)
    every[1].send_signal(signal.SIGSTOP)
    told, _ = process.communicate(timeout=240)
    assert process.returncode == BAD_RUN, told
    assert (
        "rank 1 of 2 stands still" in told
        and "launch.timeout_s=6" in told
        and "Traceback" not in told
    ), told
    assert "rank 0 of 2" not in told
    assert not [rank for rank in every.values() if rank.is_running()]
    assert "resumed from" in finish(same)
    assert [row["step"] for row in read(tmp_path / "run" / METRICS)] == list(range(1, STEPS + 1))

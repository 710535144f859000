"""launch=multinode: several machines meet, train one run, and go on when one of them was lost and came back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_architecture import ROOT
from trainer.check import check
from trainer.compose import compose
from trainer.logs.jsonl import METRICS, read
from trainer.parity import write_documents

FINE = ("launch=multinode", "launch.node_rank=1", "launch.endpoint=node0:29500", "run_dir=shared", "parallel.context=2")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("launch.endpoint=node0", "launch.endpoint=node0: machines meet at HOST:PORT"),
        ("launch.endpoint=null", "launch.endpoint=null: machines meet at HOST:PORT"),
        ("launch.node_rank=2", "launch.node_rank=2: give each of the 2 machines a number from 0 to 1"),
        ("launch.node_rank=null", "launch.node_rank=null: give each"),
        ("parallel.context=3", "3 ranks do not divide among launch.nodes=2 machines"),
        ("run_dir=null", "give run_dir=PATH, a folder that all of them see"),
        ("launch.name=local", "for several machines, but launch=local; use launch=multinode"),
    ],
)
def test_machines_that_could_not_meet_are_refused(word: str, message: str) -> None:
    assert check(compose(FINE).config) == []  # pyright: ignore
    found = check(compose([*FINE, word]).config)  # pyright: ignore
    assert found and message in found[0]


def machine(words: list[str], rank: int) -> subprocess.Popen:
    own = ("launch=multinode", f"launch.node_rank={rank}", f"launch.address=127.0.0.{2 + rank}")
    command = [sys.executable, "-m", "trainer", *words, *own]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def until(place: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not any(row["step"] >= step for row in read(place / METRICS)):
        assert process.poll() is None and time.monotonic() < end, process.stderr
        time.sleep(0.1)


@pytest.mark.full
def test_two_machines_train_on_after_one_was_killed_and_came_back(tmp_path: Path) -> None:
    place, port = tmp_path / "run", 20000 + os.getpid() % 20000
    words = ["data=files", f"data.path={write_documents(tmp_path / 'text')}", f"data.cache={tmp_path / 'cache'}"]
    words += ["context_length=64", "batch_tokens=256", "model.width=32", "model.layers=2", "parallel.context=2", "steps=9999"]
    words += ["checkpoint.every=10", "evaluation.every=0", "wandb.mode=disabled", f"run_dir={place}"]
    words += [f"launch.endpoint=127.0.0.1:{port}"]
    machines = [machine(words, rank) for rank in range(2)]
    try:
        until(place, 25, machines[0])
        machines[1].kill()
        machines[1].wait()
        reached = max(row["step"] for row in read(place / METRICS))
        machines[1] = machine(words, 1)
        until(place, reached + 20, machines[0])
        for each in machines:
            each.send_signal(signal.SIGTERM)
        assert [each.wait(60) for each in machines] == [143, 143]
        steps = [row["step"] for row in read(place / METRICS)]
        assert steps == list(range(1, len(steps) + 1))
    finally:
        for each in machines:
            each.kill()

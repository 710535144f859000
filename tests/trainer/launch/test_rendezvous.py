"""Machines meet under their own numbers, in rounds; who is missing, double or gone is said; nothing
is unpickled."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.test_architecture import ROOT
from trainer.config.compose import compose
from trainer.launch import rendezvous
from trainer.launch.nodes import Nodes, NoMeeting
from trainer.launch.rendezvous import Rendezvous
from trainer.logs.jsonl import METRICS, read
from trainer.preflight.check import check_config
from trainer.verify.whole_runs import write_documents


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def machines(monkeypatch):
    """Make machines of one run; what they say is in `said`, and what they meet in `met` or in
    `refused`."""
    monkeypatch.setattr(rendezvous, "SILENCE_S", 2.5)
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("something was unpickled"))
    port = free_port()

    class Machine:
        def __init__(self, rank: int, many: int = 3, wait_s: float = 30):
            self.said: list[str] = []
            self.handler = Rendezvous(
                Nodes(many, rank, f"127.0.0.1:{port}", None, "run", wait_s), self.said.append
            )
            self.met: list[tuple[int, int]] = []
            self.refused = ""

        def join(self) -> threading.Thread:
            def meet() -> None:
                try:
                    info = self.handler.next_rendezvous()
                    self.met.append((info.rank, info.world_size))
                except NoMeeting as error:
                    self.refused = str(error)

            thread = threading.Thread(target=meet, daemon=True)
            thread.start()
            return thread

    return Machine


def together(*machines) -> None:
    threads = []
    for machine in machines:
        threads.append(machine.join())
        time.sleep(0.3)
    for thread in threads:
        thread.join(40)


def test_ranks_follow_the_numbers_whoever_comes_first_and_each_machine_says_one_line(
    machines,
) -> None:
    last, middle, first = machines(2), machines(1), machines(0)
    together(last, middle, first)
    assert [machine.met for machine in (first, middle, last)] == [[(0, 3)], [(1, 3)], [(2, 3)]]
    assert [len(machine.said) for machine in (first, middle, last)] == [1, 1, 1]
    assert (
        first.said[0].startswith("machine 0 of 3")
        and "this console tells of the run" in first.said[0]
    )
    assert last.said[0].startswith("machine 2 of 3") and "machine 0 (" in last.said[0]
    mine = {
        entry.laddr.ip
        for entry in psutil.Process().net_connections("inet")
        if entry.status == psutil.CONN_LISTEN
    }
    assert mine == {"127.0.0.1"}


def test_one_that_was_lost_and_comes_back_takes_its_place_in_the_next_round(machines) -> None:
    first, lost = machines(0, many=2), machines(1, many=2)
    together(first, lost)
    assert first.handler.num_nodes_waiting() == 0
    back = machines(1, many=2)
    thread = back.join()
    end = time.monotonic() + 20
    while first.handler.num_nodes_waiting() == 0:
        assert time.monotonic() < end
        time.sleep(0.05)
    together(first)
    thread.join(20)
    assert first.met == [(0, 2), (0, 2)] and back.met == [(1, 2)]
    assert first.handler.round == back.handler.round == 1


def test_two_machines_of_one_number_are_refused_and_the_run_goes_on(machines) -> None:
    first, second = machines(0, many=2), machines(1, many=2)
    together(first, second)
    double = machines(1, many=2)
    thread = double.join()
    while thread.is_alive():
        assert first.handler.num_nodes_waiting() == second.handler.num_nodes_waiting() == 0
        time.sleep(0.05)
    assert (
        double.refused.startswith("launch.node_rank=1: ")
        and "a number of its own" in double.refused
    )


def test_a_machine_that_does_not_come_is_named(machines) -> None:
    first = machines(0, wait_s=1.5)
    together(first)
    assert first.refused.startswith("launch.nodes=3: machine 1, 2 did not come within 2 s")
    alone = machines(1, wait_s=0.5)
    alone.handler.nodes = Nodes(2, 1, f"127.0.0.1:{free_port()}", None, "run", 0.5)
    together(alone)
    assert "machine 0 did not answer" in alone.refused


def test_machines_that_count_differently_are_refused(machines) -> None:
    first, second = machines(0, many=2), machines(1, many=3)
    together(first, second)
    assert "launch.nodes=2, but machine 1" in first.refused and "launch.nodes=3" in second.refused


FINE = (
    "launch=multinode",
    "launch.node_rank=1",
    "launch.rdzv_endpoint=node0:29500",
    "run_dir=shared",
    "parallel.context=2",
)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("launch.rdzv_endpoint=node0", "launch.rdzv_endpoint=node0: machines meet at HOST:PORT"),
        ("launch.rdzv_endpoint=null", "launch.rdzv_endpoint=null: machines meet at HOST:PORT"),
        (
            "launch.node_rank=2",
            "launch.node_rank=2: must be a number from 0 to 1",
        ),
        ("launch.node_rank=null", "launch.node_rank=null: must be a number"),
        ("parallel.context=3", "launch.nodes=2: 3 ranks do not divide among 2 machines"),
        ("run_dir=null", "give run_dir=PATH, a folder that all of them see"),
        ("launch.name=local", "for several machines, but launch=local; use launch=multinode"),
    ],
)
def test_machines_that_could_not_meet_are_refused(word: str, message: str) -> None:
    assert check_config(compose(FINE).config) == []  # pyright: ignore
    found = check_config(compose([*FINE, word]).config)  # pyright: ignore
    assert found and message in found[0]


def machine(words: list[str], rank: int) -> subprocess.Popen:
    own = ("launch=multinode", f"launch.node_rank={rank}", f"launch.address=127.0.0.{2 + rank}")
    command = [sys.executable, "-m", "trainer", *words, *own]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def until(place: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not any(row["step"] >= step for row in read(place / METRICS)):
        assert process.poll() is None and time.monotonic() < end, process.stderr
        time.sleep(0.1)


@pytest.mark.full
def test_two_machines_train_on_after_one_was_killed_and_came_back(tmp_path: Path) -> None:
    place, port = tmp_path / "run", 20000 + os.getpid() % 20000
    words = [
        "data=files",
        f"data.path={write_documents(tmp_path / 'text')}",
        f"data.cache={tmp_path / 'cache'}",
    ]
    words += [
        "context_length=64",
        "batch_tokens=256",
        "model.width=32",
        "model.layers=2",
        "parallel.context=2",
        "steps=9999",
    ]
    words += [
        "checkpoint.every=10",
        "evaluation.every=0",
        "wandb.mode=disabled",
        "log.plots=false",
        f"run_dir={place}",
    ]
    words += [f"launch.rdzv_endpoint=127.0.0.1:{port}"]
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

"""Killed at any moment and started again, a run ends where it would have ended: through the command
that a user gives.

All are forked (tests/support/forked_python.py).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import forked_python
from tests.test_architecture import ROOT
from trainer.logs.jsonl import METRICS, MetricsRow, read
from trainer.logs.loggers.base import Logger, RunStart
from trainer.verify.whole_runs import write_documents

STEPS = 10


class Slow(Logger):
    """Holds up every step, so that a signal comes before the last whatever the machine is at."""

    background = False

    def open(self, run: RunStart) -> None:
        pass

    def step(self, row: MetricsRow) -> None:
        time.sleep(0.3)

    def evaluation(self, step: int, name: str, value: float, made_of: Any) -> None:
        pass


def words(folder: Path, name: str, *more: str) -> list[str]:
    glob = write_documents(folder / "text")
    return [
        *(
            "data=files",
            f"data.path={glob}",
            f"data.cache={folder / 'cache'}",
            f"run_dir={folder / name}",
        ),
        *(
            f"steps={STEPS}",
            "context_length=126",
            "batch_tokens=504",
            "model.width=32",
            "model.layers=2",
            "model.heads=4",
        ),
        *(
            "checkpoint.every=2",
            "evaluation.every=5",
            "evaluation.batches=2",
            "wandb.mode=disabled",
            "log.plots=false",
        ),
        *more,
    ]


def start(arguments: list[str], popen: type = forked_python.Popen) -> subprocess.Popen:
    return popen(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(arguments: list[str]) -> str:
    process = start(arguments)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


def kill_after(arguments: list[str], rows: int, pause_s: float, metrics: Path) -> None:
    """Start, wait until so many steps are logged and a moment more, then SIGKILL the launcher; its
    ranks must follow."""
    process = start(arguments)
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None and len(list(read(metrics))) < rows:
        time.sleep(0.02)
    time.sleep(pause_s)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def weights(directory: Path) -> dict[str, str]:
    """Checksum of every file of the last checkpoint."""
    manifest = json.loads(
        (directory / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").read_text()
    )
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nobody stopped, on two ranks."""
    finish(words(folder, "whole", "parallel.context=2", "engine=fsdp"))
    return folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(5,), pytest.param((1, 7), marks=pytest.mark.full)], ids=str)
def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(kills, folder, whole):
    killed = folder / f"killed {len(kills)}"
    same = words(folder, killed.name, "parallel.context=2", "engine=fsdp")
    moments = random.Random(20261122)
    for rows in kills:
        kill_after(same, rows, moments.uniform(0, 0.4), killed / METRICS)
    finish(same)
    assert weights(killed) == weights(whole)
    a, b = (
        [(r["step"], r["tokens"], r["loss"]) for r in read(path / METRICS)]
        for path in (whole, killed)
    )
    assert a == b and [step for step, *_ in a] == list(range(1, STEPS + 1))


@pytest.mark.full
def test_a_run_goes_on_with_other_ranks_and_another_engine(folder, whole):
    kill_after(
        words(folder, "moved", "parallel.context=3", "engine=fsdp"),
        5,
        0.0,
        folder / "moved" / METRICS,
    )
    told = finish(
        words(folder, "moved", "parallel.context=2", "parallel.layout=contiguous", "engine=single")
    )
    assert "resumed from" in told
    a, b = (list(read(path / METRICS)) for path in (whole, folder / "moved"))
    assert [r["tokens"] for r in a] == [r["tokens"] for r in b]
    assert max(abs(x["loss"] / y["loss"] - 1) for x, y in zip(a, b, strict=True)) < 1e-4


@pytest.mark.full
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, whole):
    first = words(folder, "damaged", "parallel.context=2", "engine=fsdp", "checkpoint.keep=3")
    kill_after(first, 9, 0.0, folder / "damaged" / METRICS)
    newest = sorted((folder / "damaged" / "checkpoints").glob("step_*"))[-1]
    victim = max(
        (p for p in newest.iterdir() if p.name != "manifest.json"), key=lambda p: p.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    told = finish(first)
    assert f"checkpoint {newest.name} is damaged" in told and "resumed from" in told
    assert weights(folder / "damaged") == weights(whole)


@pytest.mark.slow
def test_sigterm_saves_and_says_so(folder, whole):
    slow = "logger=[]", f"logger.slow._target_={__name__}.Slow"
    ways = "parallel.context=2", "engine=fsdp", "checkpoint.every=1000"
    asked = words(folder, "asked", *ways, *slow)
    process = start(asked)
    while process.poll() is None and not list(read(folder / "asked" / METRICS)):
        time.sleep(0.02)
    ranks = psutil.Process(process.pid).children(recursive=True)
    for rank in ranks:  # or they might be done before the launcher has passed the signal on
        rank.suspend()
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(2)
    for rank in ranks:
        rank.resume()
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in told, told
    assert sorted((folder / "asked" / "checkpoints").glob("step_*")), told
    finish(asked)
    assert weights(folder / "asked") == weights(whole)


@pytest.mark.full
def test_after_a_rank_was_killed_all_ranks_are_back_from_the_last_checkpoint(folder, whole):
    process = start(
        words(folder, "restarted", "parallel.context=2", "engine=fsdp", "launch.max_restarts=2")
    )
    for victim, rows in ((1, 5), (0, 9)):
        end = time.monotonic() + 240
        while (
            time.monotonic() < end
            and process.poll() is None
            and len(list(read(folder / "restarted" / METRICS))) < rows
        ):
            time.sleep(0.02)
        # The launcher starts the ranks in their order.
        every = sorted(psutil.Process(process.pid).children(), key=lambda each: each.pid)
        every[victim].kill()
        psutil.wait_procs(every, timeout=60)
    told, _ = process.communicate(timeout=240)
    assert (
        process.returncode == 0
        and "all were started again (2 of launch.max_restarts=2 times)" in told
    ), told
    assert "resumed from" in told and "Traceback" not in told
    assert weights(folder / "restarted") == weights(whole)
    a, b = (
        [(r["step"], r["tokens"], r["loss"]) for r in read(path / METRICS)]
        for path in (whole, folder / "restarted")
    )
    assert a == b and [step for step, *_ in a] == list(range(1, STEPS + 1))
